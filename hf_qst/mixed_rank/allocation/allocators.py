"""Stage 2: a rank for each layer under one budget of parameters.

Minimise the sum over layers l of e_l(r_l) subject to the sum of their costs, where e_l(r) is the share of the layer's
output energy that rank r leaves out and the cost is r (d_in + d_out) parameters; leaving a layer dense costs d_in d_out
and leaves nothing out. Normalising by each layer's own energy is essential: with raw energies the layers with large
activations take the whole budget.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence

from hf_qst.base_model.budget import BudgetError
from hf_qst.mixed_rank.decomposition.spectrum import DENSE, LayerSpectrum

ALLOCATORS = ("hull", "gradual", "uniform")
# Step of the gradual search, as a part of the break-even rank.
_GRADUAL_STEP = 0.05


def allocate_ranks(
    layers: Sequence[LayerSpectrum],
    budget: int,
    allocator: str = "hull",
    rank_multiple: int = 1,
    min_rank_ratio: float = 0.5,
    allow_dense: bool = True,
    fixed: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Ranks that fit a budget of parameters, by layer name; `DENSE` (0) leaves a layer as it is.

    Args:
        layers: the layers, in any order.
        budget (`int`): parameters that all the layers' weights may have together.
        allocator (`str`):
            `"hull"` (the lower convex hull of each layer's choices, best first: optimal for the relaxation to
            fractional choices, and within one step of it for whole ones), `"gradual"` (the paper's greedy search from
            the dense model), `"uniform"` (one fraction of the break-even rank for all).
        rank_multiple (`int`): ranks are multiples of it.
        min_rank_ratio (`float`): no rank falls below this part of the uniform one.
        allow_dense (`bool`): whether a layer may stay dense.
        fixed: ranks given by name; they count in the budget and are not changed.

    Raises:
        BudgetError: no choice fits; the message names the smallest budget that can be met.
        ValueError: an unknown allocator.
    """
    if allocator not in ALLOCATORS:
        raise ValueError(f"allocator must be one of {', '.join(ALLOCATORS)}, got {allocator!r}")
    fixed = dict(fixed or {})
    taken = sum(layer.cost(fixed[layer.name]) for layer in layers if layer.name in fixed)
    free = [layer for layer in layers if layer.name not in fixed]
    smallest = taken + sum(min(_choices(layer, 1, rank_multiple, allow_dense))[0] for layer in free)
    if smallest > budget:
        raise BudgetError(
            f"a budget of {budget} parameters cannot be met: the layers need at least {smallest} "
            f"(ranks of {rank_multiple}, given ranks {taken} parameters)",
            smallest,
        )
    if not free:
        return {layer.name: fixed[layer.name] for layer in layers}
    budget -= taken
    uniform = _uniform(free, budget, rank_multiple, allow_dense)
    if allocator == "uniform":
        chosen = uniform
    else:
        choices = {}
        for layer in free:
            # A uniform choice of dense has no rank; its floor is what the break-even rank would have.
            rank = uniform[layer.name] or layer.break_even
            choices[layer.name] = _choices(layer, min_rank_ratio * rank, rank_multiple, allow_dense)
        if sum(min(options)[0] for options in choices.values()) > budget:
            # Rounding the floors up to the multiple does not fit.
            choices = {layer.name: _choices(layer, 1, rank_multiple, allow_dense) for layer in free}
        chosen = (_hull if allocator == "hull" else _gradual)(free, choices, budget)
    return {layer.name: fixed.get(layer.name, chosen.get(layer.name)) for layer in layers}


def _choices(layer: LayerSpectrum, lowest: float, multiple: int, allow_dense: bool) -> list[tuple[int, float, int]]:
    """(cost, error, rank) of every choice of one layer, cheapest first."""
    ranks = layer.ranks(math.floor(lowest), multiple)
    options = [(layer.cost(rank), layer.error(rank), rank) for rank in ranks]
    if allow_dense or not options:
        options.append((layer.dense_cost, 0.0, DENSE))
    return options


def _lower_hull(options: list[tuple[int, float, int]]) -> list[tuple[int, float, int]]:
    hull: list[tuple[int, float, int]] = []
    for point in options:
        while len(hull) >= 2 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: tuple[int, float, int], b: tuple[int, float, int]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def _hull(layers: Sequence[LayerSpectrum], choices: Mapping[str, list], budget: int) -> dict[str, int]:
    hulls = {name: _lower_hull(options) for name, options in choices.items()}
    place = dict.fromkeys(hulls, 0)
    left = budget - sum(hull[0][0] for hull in hulls.values())
    queue = [(_slope(*hull[:2]), name) for name, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        hull, at = hulls[name], place[name]
        step = hull[at + 1][0] - hull[at][0]
        if step > left:
            continue
        left -= step
        place[name] = at + 1
        if at + 2 < len(hull):
            heapq.heappush(queue, (_slope(hull[at + 1], hull[at + 2]), name))
    return _fill(choices, {name: hulls[name][at] for name, at in place.items()}, left)


def _fill(choices: Mapping[str, list], chosen: dict[str, tuple[int, float, int]], left: int) -> dict[str, int]:
    """Spend what is left: again and again the one upgrade that lowers the error most and still fits."""
    while True:
        best, gain = None, -1.0
        for name, (cost, error, _) in chosen.items():
            # Larger choices have smaller errors, so a layer's best upgrade is the largest that fits.
            fitting = [option for option in choices[name] if cost < option[0] <= cost + left]
            if fitting and error - fitting[-1][1] > gain:
                best, gain = (name, fitting[-1]), error - fitting[-1][1]
        if best is None:
            return {name: rank for name, (_, _, rank) in chosen.items()}
        name, option = best
        left -= option[0] - chosen[name][0]
        chosen[name] = option


def _gradual(layers: Sequence[LayerSpectrum], choices: Mapping[str, list], budget: int) -> dict[str, int]:
    """The paper's local search: from the dense model down, each time where an error is cheapest to accept."""
    strides = {layer.name: max(1, math.ceil(_GRADUAL_STEP * len(choices[layer.name]))) for layer in layers}
    place = {name: len(options) - 1 for name, options in choices.items()}
    spent = sum(options[-1][0] for options in choices.values())

    def move(name: str) -> tuple[float, str, int] | None:
        if place[name] == 0:
            return None
        options, at = choices[name], place[name]
        to = max(at - strides[name], 0)
        return ((options[to][1] - options[at][1]) / (options[at][0] - options[to][0]), name, to)

    while spent > budget:
        _, name, to = min(step for step in map(move, choices) if step)
        spent += choices[name][to][0] - choices[name][place[name]][0]
        place[name] = to
    return _fill(choices, {name: choices[name][at] for name, at in place.items()}, budget - spent)


def _uniform(layers: Sequence[LayerSpectrum], budget: int, multiple: int, allow_dense: bool) -> dict[str, int]:
    """The largest common fraction of the break-even rank that fits, and one multiple more where it still does."""
    if allow_dense and budget >= sum(layer.dense_cost for layer in layers):
        return dict.fromkeys((layer.name for layer in layers), DENSE)
    choices = {layer.name: _choices(layer, 1, multiple, False) for layer in layers}

    def at(fraction: float, layer: LayerSpectrum) -> tuple[int, float, int]:
        options = choices[layer.name]
        fitting = [option for option in options if option[0] <= fraction * layer.dense_cost]
        return fitting[-1] if fitting else options[0]

    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        fits = sum(at(middle, layer)[0] for layer in layers) <= budget
        low, high = (middle, high) if fits else (low, middle)
    chosen = {layer.name: at(low, layer) for layer in layers}
    left = budget - sum(option[0] for option in chosen.values())
    # Largest remainder first, as seats are given out.
    for layer in sorted(layers, key=lambda one: chosen[one.name][0] - low * one.dense_cost):
        larger = [o for o in choices[layer.name] if chosen[layer.name][0] < o[0] <= chosen[layer.name][0] + left]
        if larger:
            left -= larger[0][0] - chosen[layer.name][0]
            chosen[layer.name] = larger[0]
    return {name: rank for name, (_, _, rank) in chosen.items()}
