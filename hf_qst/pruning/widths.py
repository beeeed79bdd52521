"""From scores of channels to the channels that stay: deterministic, and on the budget."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hf_qst.base_model.budget import BudgetError
from hf_qst.pruning.layout import ON_RESIDUAL, SELECTIONS, PruningLayout

CONSTRAINTS = ("none", "layer", "model")
AUTO = "auto"
_BISECTIONS = 60


@dataclass(frozen=True)
class SelectionMap:
    """Which vector of scores each selection of each layer is chosen by.

    `owners` [5 * layers] are indices into `sizes`, or None for a selection that keeps everything. Selections share an
    owner under a constraint: `"layer"` has one choice of residual channels a layer, `"model"` one for all layers, as
    pruning of the residual itself would need.
    """

    layout: PruningLayout
    owners: tuple[int | None, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, layout: PruningLayout, selections: Sequence[str], constraint: str = "none") -> SelectionMap:
        owners, sizes, known = [], [], {}
        for layer in range(layout.num_layers):
            for name in SELECTIONS:
                if name not in selections or name not in layout.blocks[layer].prunable:
                    owners.append(None)
                    continue
                shared = constraint != "none" and name in ON_RESIDUAL
                key = (layer if constraint == "layer" else None, "residual") if shared else (layer, name)
                if key not in known:
                    known[key] = len(sizes)
                    sizes.append(layout.size(name, layer))
                owners.append(known[key])
        return cls(layout, tuple(owners), tuple(sizes))

    def expand(self, values: Sequence) -> list:
        """One value for each selection [5 * layers], None where everything is kept."""
        return [None if owner is None else values[owner] for owner in self.owners]

    def widths(self, owned: Sequence) -> list[list]:
        """Widths [layers, 5] from one width for each owner; ints, or scalar tensors."""
        flat = [
            self.layout.size(SELECTIONS[i % len(SELECTIONS)], i // len(SELECTIONS)) if width is None else width
            for i, width in enumerate(self.expand(owned))
        ]
        return [flat[i : i + len(SELECTIONS)] for i in range(0, len(flat), len(SELECTIONS))]

    def parameters(self, owned: Sequence[int]) -> int:
        """Weights left at these widths of the owners."""
        return self.layout.count(self.widths(owned))


def multiple_of(width_multiple: int | str, hidden_size: int) -> int:
    """What every width is a multiple of; `"auto"`: 64 where the residual has 512 channels or more, otherwise 1.

    On a CPU bitsandbytes multiplies 4-bit weights of an odd width several times more slowly, because they take a path of its
    own in Python; 64 is the size of its blocks. The matrix units of GPUs want multiples of 8 to 64 too. In a narrow model
    steps of 64 are coarse.
    """
    if width_multiple != AUTO:
        return width_multiple
    return 64 if hidden_size >= 512 else 1


def rounded_width(count: int, size: int, multiple: int, least: int) -> int:
    """The width for `count` wanted channels of `size`: the nearest multiple, at least `least`, at most all of them.

    All of them is a width however large the multiple is.
    """
    nearest = (max(count, least) + multiple // 2) // multiple * multiple
    smallest = -(-least // multiple) * multiple
    return min(max(nearest, smallest), size)


def widths_on_budget(
    scores: Sequence[torch.Tensor], plan: SelectionMap, budget: int, multiple: int = 1, least: int = 1
) -> list[int]:
    """Widths of the owners that fill `budget` weights and do not exceed it.

    One threshold for all scores, found by bisection (the weights left fall as it rises); what it leaves of the budget
    goes to the next best channels that fit.

    Args:
        scores (`Sequence[torch.Tensor]`): of each owner's channels [size]; higher stays longer.
        plan ([`SelectionMap`])
        budget (`int`): weights, as `PruningLayout.parameters` counts them.
        multiple, least (`int`): of and for every width.

    Raises:
        BudgetError: the least widths exceed the budget; its `smallest` is what they take.
    """
    ascending = [torch.sort(s.detach().double().cpu()).values.tolist() for s in scores]

    def at(threshold: float) -> list[int]:
        counts = [len(s) - bisect_left(s, threshold) for s in ascending]
        return [rounded_width(c, n, multiple, least) for c, n in zip(counts, plan.sizes, strict=True)]

    smallest = plan.parameters([rounded_width(0, n, multiple, least) for n in plan.sizes])
    if smallest > budget:
        raise BudgetError(
            f"a budget of {budget} weights cannot be met: with every width at its least, {smallest} of "
            f"{plan.layout.total} remain",
            smallest,
        )
    low = min(s[0] for s in ascending)
    high = max(s[-1] for s in ascending) + 1.0
    if plan.parameters(at(low)) <= budget:
        return at(low)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if plan.parameters(at(middle)) <= budget:
            high = middle
        else:
            low = middle
    return _filled(at(high), ascending, plan, budget, multiple)


def _filled(widths: list[int], ascending: list[list[float]], plan: SelectionMap, budget: int, multiple: int):
    """Widths with the best next channels added as long as one owner's fit."""

    def candidate(owner: int) -> tuple[float, int]:
        return -ascending[owner][len(ascending[owner]) - widths[owner] - 1], owner

    heap = [candidate(owner) for owner, size in enumerate(plan.sizes) if widths[owner] < size]
    heapq.heapify(heap)
    while heap:
        _, owner = heapq.heappop(heap)
        before = widths[owner]
        widths[owner] = min(before + multiple, plan.sizes[owner])
        if plan.parameters(widths) > budget:
            widths[owner] = before  # nor will it fit when others have grown
        elif widths[owner] < plan.sizes[owner]:
            heapq.heappush(heap, candidate(owner))
    return widths


def best_channels(scores: Sequence[torch.Tensor], widths: Sequence[int]) -> list[torch.Tensor]:
    """The channels with the highest scores, as bool [size] for each owner; of equal ones the first."""
    masks = []
    for score, width in zip(scores, widths, strict=True):
        chosen = torch.sort(score.detach().double().cpu(), descending=True, stable=True).indices[:width]
        masks.append(torch.zeros(len(score), dtype=torch.bool).index_fill_(0, chosen, True))
    return masks


def masks_by_layer(plan: SelectionMap, owned: Sequence[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """For each layer its five masks by name, bool [size]."""
    count = len(SELECTIONS)
    flat = [
        torch.ones(plan.layout.size(SELECTIONS[i % count], i // count), dtype=torch.bool) if mask is None else mask
        for i, mask in enumerate(plan.expand(owned))
    ]
    return [dict(zip(SELECTIONS, flat[i : i + count], strict=True)) for i in range(0, len(flat), count)]
