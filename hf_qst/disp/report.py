"""What pruning leaves, counted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hf_qst.base_model.decoder_stack import find_decoder_stack
from hf_qst.disp.selection import SelectionNetwork
from hf_qst.pruning.layout import SELECTIONS
from hf_qst.pruning.options import other_parameters


@dataclass(frozen=True)
class PruningReport:
    """Widths and parameters of a hardened choice.

    `widths` [layers, 5] in the order of `SELECTIONS`; `parameters` and `full_parameters` count the blocks' matrices,
    `other_parameters` all else; `threshold_ratio` is the part of the matrices that would stay if every channel above
    the threshold did: far from `ratio` means that the choice is not yet made and hardening will hurt.
    """

    widths: list[list[int]]
    parameters: int
    full_parameters: int
    other_parameters: int
    budget: int
    threshold_ratio: float

    @classmethod
    def of(cls, model: nn.Module, network: SelectionNetwork) -> PruningReport:
        widths = [[int(masks[name].sum()) for name in SELECTIONS] for masks in network.masks()]
        return cls(
            widths=widths,
            parameters=network.layout.count(widths),
            full_parameters=network.layout.total,
            other_parameters=other_parameters(model, find_decoder_stack(model)),
            budget=network.budget,
            threshold_ratio=network.threshold_ratio(),
        )

    @property
    def ratio(self) -> float:
        """Kept part of the blocks' matrices."""
        return self.parameters / self.full_parameters

    @property
    def model_ratio(self) -> float:
        """Kept part of all parameters, the biases of removed channels not subtracted."""
        return (self.parameters + self.other_parameters) / (self.full_parameters + self.other_parameters)

    @property
    def projected(self) -> float:
        """By how much hardening moved the ratio to put it on the budget."""
        return self.ratio - self.threshold_ratio

    def __str__(self) -> str:
        mean = [sum(column) / len(column) for column in zip(*self.widths, strict=True)]
        widths = ", ".join(f"{name} {value:.0f}" for name, value in zip(SELECTIONS, mean, strict=True))
        return (
            f"kept {self.parameters:,} of {self.full_parameters:,} weights of the blocks ({self.ratio:.2%}; of all "
            f"parameters {self.model_ratio:.2%}); mean widths: {widths}; the threshold alone would keep "
            f"{self.threshold_ratio:.2%}"
        )
