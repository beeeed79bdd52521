"""What one layer loses by rank: the result of stage 1, from which stage 2 chooses."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

DENSE = 0
"""In the place of a rank: the layer stays as it is."""


@dataclass
class LayerSpectrum:
    """What the allocation knows of one layer.

    Args:
        name (`str`): the module's full name.
        in_features, out_features (`int`): its shape.
        energies: output energies [min(d_in, d_out)], descending.
        total (`float`, *optional*): what errors are relative to; the sum of the energies by default.
        weight (`float`): how much this layer's relative error counts.
        min_saving (`float`): part of the parameters that factors have to save; otherwise the layer stays dense.
    """

    name: str
    in_features: int
    out_features: int
    energies: torch.Tensor
    total: float | None = None
    weight: float = 1.0
    min_saving: float = 0.0

    def __post_init__(self):
        energies = self.energies.double().cpu()
        tails = energies.flip(0).cumsum(0).flip(0)
        total = tails[0].item() if self.total is None else self.total
        # A layer without output, as with all-zero inputs, loses nothing at any rank.
        scale = 1.0 / total if total > 0 else 0.0
        self._errors = [*(tails * scale).tolist(), 0.0]

    @property
    def dense_cost(self) -> int:
        return self.in_features * self.out_features

    @property
    def break_even(self) -> float:
        """The rank whose factors are as large as the weight."""
        return self.dense_cost / (self.in_features + self.out_features)

    def cost(self, rank: int) -> int:
        """Parameters of the weight at this rank; `DENSE` is the weight itself."""
        return self.dense_cost if rank == DENSE else rank * (self.in_features + self.out_features)

    def relative_error(self, rank: int) -> float:
        """Part of the output energy that is left out at this rank."""
        return 0.0 if rank == DENSE else self._errors[min(rank, len(self._errors) - 1)]

    def error(self, rank: int) -> float:
        """Relative output error at this rank, times the layer's weight."""
        return self.weight * self.relative_error(rank)

    def ranks(self, lowest: int, multiple: int) -> list[int]:
        """Multiples of `multiple` from `lowest` on that save parameters, and at least the part `min_saving` of them."""
        most = (1.0 - self.min_saving) * self.dense_cost
        saving = range(multiple, math.ceil(self.break_even), multiple)
        return [rank for rank in saving if rank >= lowest and self.cost(rank) <= most]
