"""Statistics of the experts of a mixture, each of which sees the tokens that were routed to it.

An expert that saw few tokens has a noisy second moment C. For the layers that read the hidden state it is shrunk towards
the moment P of all tokens of the layer,

    (1 - rho) C + rho P,   rho = min(1, sum_i ||x_i'x_i - C||^2 / (n (n - 1) ||C - P||^2)),

which is Ledoit and Wolf's optimal intensity for this target: the estimated variance of C by its distance from P. An
expert with one token or none takes P. What the second layer of an expert reads is in a basis of the expert's own, so that
there is no common moment of it; without tokens its factors are those of the plain SVD.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from hf_qst.base_model.experts import SplitExperts, enclosing_experts
from hf_qst.calibration.moments import CrossMoment, MeanInput, SecondMoment

Group = tuple[str, ...]


def pool_of(model: nn.Module, name: str) -> str | None:
    """Path of the module whose input is that of all experts where `name` reads it; None for any other layer."""
    found = enclosing_experts(model, name)
    return found[0] if found is not None and found[2] == found[1].names[0] else None


def with_pools(model: nn.Module, groups: Sequence[Group]) -> list[Group]:
    """The groups, with one for all experts of a layer before the first that reads the same input."""
    found: dict[Group, None] = {}
    for group in groups:
        if (pool := pool_of(model, group[0])) is not None:
            found.setdefault((pool,))
        found[group] = None
    return list(found)


def is_pool(model: nn.Module, group: Group) -> bool:
    """Whether `with_pools` added this group."""
    return isinstance(model.get_submodule(group[0]), SplitExperts)


class ExpertMoment(CrossMoment):
    """The moments of one expert, shrunk towards those of all tokens, where these are given.

    `count` is the number of rows that the result is worth, n / (1 - rho), and at most that of all tokens; never 0, so that
    all is zero where nothing was seen.
    """

    def __init__(self, own: SecondMoment, pool: SecondMoment | None):
        self._rows = own.count
        part = 0.0 if pool is None else _intensity(own, pool)
        self.count = pool.count if part == 1.0 else max(own.count, 1) / (1.0 - part)
        if pool is not None:
            self.count = min(self.count, pool.count)
        for name in ("sum", "products", "fourth", "cross", "other_sum"):
            if hasattr(own, name):
                mean = getattr(own, name) / max(own.count, 1)
                if pool is not None:
                    mean = torch.lerp(mean, getattr(pool, name) / pool.count, part)
                setattr(self, "_products" if name == "products" else name, self.count * mean)
        self.size, self._whole = own.size, True

    @property
    def rows(self) -> int:
        return self._rows


def _intensity(own: SecondMoment, pool: SecondMoment) -> float:
    if own.count <= 1:
        return 1.0
    moment = own.second_moment()
    distance = (moment - pool.second_moment()).square().sum().item()
    variance = (own.fourth / own.count - moment.square().sum()).item() / (own.count - 1)
    return min(max(variance, 0.0) / distance, 1.0) if distance > 0 else 1.0


def of_expert(own: SecondMoment | MeanInput, pool: SecondMoment | None):
    """What stands for an expert's statistic: shrunk towards the pool, where there is one, and never of no rows."""
    if not isinstance(own, MeanInput):
        return ExpertMoment(own, pool)
    if own.count == 0:
        # One row of zeros stands for none: no direction is better than another.
        own.add(own.sums.new_zeros(1, own.sums.shape[1]), torch.zeros(1, dtype=torch.long, device=own.sums.device))
    return own


def weigh_experts(model: nn.Module, layers) -> None:
    """Let the same layer of all experts count as one layer: each for its part of their output energy on all tokens.

    Args:
        model
        layers ([`~hf_qst.mixed_rank.decomposition.stage.Decomposition`]): whose spectra get their weights.
    """
    energies: dict[tuple[str, str], dict[str, float]] = {}
    for name, spectrum in layers.spectra.items():
        if (found := enclosing_experts(model, name)) is not None:
            rows = layers.facts[name].get("rows", 1)
            energies.setdefault((found[0], found[2]), {})[name] = rows * spectrum.total
    for own in energies.values():
        total = sum(own.values())
        for name, energy in own.items():
            layers.spectra[name].weight = energy / total if total > 0 else 1 / len(own)
