"""What DISP trains: the logits of all selections, sampled while training and hardened after it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from hf_qst.disp.config import DISPConfig
from hf_qst.disp.estimators import ESTIMATORS, THRESHOLDS
from hf_qst.disp.hardening import SelectionMap, best_channels, masks_by_layer, rounded_width, widths_on_budget
from hf_qst.disp.hypernetwork import make_hypernetwork
from hf_qst.disp.layout import PruningLayout

_UNDECIDED = 2


@dataclass
class SampledSelections:
    """One draw: gates for every selection [5 * layers] (None: keeps everything), and the budget term as a scalar."""

    gates: list[torch.Tensor | None]
    penalty: torch.Tensor
    ratio: torch.Tensor


class SelectionNetwork(nn.Module):
    """The hypernetwork of one adapter with its budget.

    Args:
        config ([`DISPConfig`])
        layout ([`PruningLayout`]): the decoder's sizes.
        budget (`int`): weights of the blocks' matrices to keep.
    """

    def __init__(self, config: DISPConfig, layout: PruningLayout, budget: int):
        super().__init__()
        self.config, self.layout, self.budget = config, layout, budget
        self.plan = SelectionMap.of(layout, config.selections, config.constraint)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.hypernetwork = make_hypernetwork(
                config.hypernetwork,
                self.plan.sizes,
                config.hypernetwork_input_size,
                config.hypernetwork_hidden_size,
            )
        # Saved with the adapter, so that a hardened model stays what it is.
        self.register_buffer("kept", torch.full((sum(self.plan.sizes),), _UNDECIDED, dtype=torch.uint8))
        self._for_good: tuple | None = None
        self._decided: tuple | None = None
        # What a schedule may change while training runs.
        self.keep_share = budget / layout.total
        self.regularization, self.temperature = config.regularization, config.temperature

    @property
    def is_hardened(self) -> bool:
        """Whether the choice was made for good."""
        state = _state([self.kept])
        if self._for_good is None or self._for_good[0] != state:  # reading the tensor stops a GPU
            self._for_good = state, bool(self.kept[0] != _UNDECIDED)
        return self._for_good[1]

    def logits(self) -> list[torch.Tensor]:
        """float32 [size] for each owner, with the initial bias added; above the threshold a channel is kept."""
        with torch.autocast(self.kept.device.type, enabled=False):
            return [output.float() + self.config.initial_bias for output in self.hypernetwork()]

    def sample(self) -> SampledSelections:
        """Draw gates, and the budget term lambda |ln(T / budget)| of the same draw, both with gradients."""
        draw = ESTIMATORS[self.config.estimator]
        samples = [draw(z, self.temperature, self.config.gumbel_temperature) for z in self.logits()]
        counted = [sample.counted.sum() for sample in samples]
        full = counted[0].detach()
        widths = torch.stack([torch.stack([full.new_tensor(float(w)) if isinstance(w, int) else w for w in row])
                              for row in self.plan.widths(counted)])  # fmt: skip
        ratio = self.layout.parameters(widths) / self.layout.total
        penalty = self.regularization * (ratio.log() - math.log(self.keep_share)).abs()
        return SampledSelections(self.plan.expand([s.gates for s in samples]), penalty, ratio.detach())

    @torch.no_grad()
    def threshold_ratio(self) -> float:
        """The part of the weights that stays if every channel above the threshold does."""
        return self.plan.parameters(self._threshold_widths(self.logits())) / self.layout.total

    def _threshold_widths(self, logits: list[torch.Tensor]) -> list[int]:
        threshold, config = THRESHOLDS[self.config.estimator], self.config
        return [
            rounded_width(int((z > threshold).sum()), len(z), config.width_multiple, config.min_width) for z in logits
        ]

    def hardened(self) -> list[torch.Tensor]:
        """The channels that stay, bool [size] on the CPU for each owner; the same answer for the same parameters.

        Raises:
            BudgetError: the least widths exceed the budget.
        """
        return self._decision()[0]

    def hardened_gates(self) -> list[torch.Tensor | None]:
        """Hardened gates for every selection [5 * layers]; None where everything is kept."""
        return self.plan.expand(self._decision()[1])

    @torch.no_grad()
    def _decision(self) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        """Masks and gates of the owners, made anew when a parameter has changed."""
        state = _state([self.kept, *self.hypernetwork.parameters()])
        if self._decided is None or self._decided[0] != state:
            masks = [part.cpu().bool() for part in self.kept.split(list(self.plan.sizes))]
            if not self.is_hardened:
                logits = self.logits()
                masks = best_channels(logits, self._hardened_widths(logits))
            gates = [None if mask.all() else mask.to(self.kept.device).float() for mask in masks]
            self._decided = state, masks, gates
        return self._decided[1:]

    def _hardened_widths(self, logits: list[torch.Tensor]) -> list[int]:
        if self.config.hardening == "threshold":
            return self._threshold_widths(logits)
        return widths_on_budget(logits, self.plan, self.budget, self.config.width_multiple, self.config.min_width)

    @torch.no_grad()
    def harden(self) -> None:
        """Make the choice for good: from here on training changes nothing."""
        self.kept.copy_(torch.cat(self.hardened()))

    def masks(self) -> list[dict[str, torch.Tensor]]:
        """For each layer its five hardened masks by name, bool [size] on the CPU."""
        return masks_by_layer(self.plan, self.hardened())


def _state(tensors: list[torch.Tensor]) -> tuple:
    """Changes whenever one of the tensors is written to or exchanged."""
    return tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)
