"""What DISP trains: the logits of all selections, sampled while training and hardened after it."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call

from hf_qst.base_model.offloading import has_values
from hf_qst.disp.config import DISPConfig
from hf_qst.disp.estimators import ESTIMATORS, THRESHOLDS
from hf_qst.disp.hypernetwork import make_hypernetwork
from hf_qst.pruning.layout import PruningLayout
from hf_qst.pruning.widths import (
    SelectionMap,
    best_channels,
    masks_by_layer,
    multiple_of,
    rounded_width,
    widths_on_budget,
)

_UNDECIDED = 2


@dataclass
class SampledSelections:
    """One draw: gates for every selection [5 * layers] (None: keeps everything), and the budget term as a scalar."""

    gates: list[torch.Tensor | None]
    penalty: torch.Tensor
    ratio: torch.Tensor


class UndecidableError(ValueError):
    """The logits hold NaN or infinity: no choice of channels follows from them."""


@dataclass
class _Decision:
    """A choice of channels with all that it follows from.

    `seen`: the logits of all owners, or the choice made for good; `settings`: what else the choice depends on; `masks`:
    bool [size] on the CPU for each owner; `gates`: the same as float32 on the network's device, None where all is kept.
    """

    seen: torch.Tensor
    settings: tuple
    masks: list[torch.Tensor]
    gates: list[torch.Tensor | None]

    def follows_from(self, seen: torch.Tensor, settings: tuple) -> bool:
        return self.settings == settings and self.seen.device == seen.device and torch.equal(self.seen, seen)


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
        with torch.random.fork_rng(devices=[], enabled=config.init_weights):
            if config.init_weights:
                torch.manual_seed(config.seed)
            self.hypernetwork = make_hypernetwork(
                config.hypernetwork,
                self.plan.sizes,
                config.hypernetwork_input_size,
                config.hypernetwork_hidden_size,
            )
            if not config.init_weights:
                for parameter in self.hypernetwork.parameters():
                    nn.init.normal_(parameter)
        # Saved with the adapter, so that a hardened model stays what it is.
        self.register_buffer("kept", torch.full((sum(self.plan.sizes),), _UNDECIDED, dtype=torch.uint8))
        self._decided: _Decision | None = None
        self._is_new = True
        # Whether the parameters stay in the base's dtype (autocast_adapter_dtype=False), in training too.
        self.in_base_dtype = False
        # What a schedule may change while training runs.
        self.keep_share = budget / layout.total
        self.regularization, self.temperature = config.regularization, config.temperature

    @property
    def is_hardened(self) -> bool:
        """Whether the choice was made for good. Reads one number, for which a GPU finishes what it is doing."""
        return has_values(self.kept) and bool(self.kept[0] != _UNDECIDED)

    @property
    def awaits_start(self) -> bool:
        """Whether the method of `start_scores` is still to be asked: nothing was learned or loaded yet."""
        config = self.config
        return self._is_new and config.init_weights and config.manifest is None and config.starting_method is not None

    @torch.no_grad()
    def start_at(self, logits: list[torch.Tensor]) -> None:
        """Begin with these logits, [size] of each owner; computed in float32, whatever the parameters are kept in."""
        if not self.in_base_dtype:
            self.hypernetwork.float()  # SFTTrainer casts what trains on a quantised base to bfloat16
        wide = copy.deepcopy(self.hypernetwork).float()
        wide.start_at([z - self.config.initial_bias for z in logits])
        for mine, started in zip(self.hypernetwork.parameters(), wide.parameters(), strict=True):
            mine.copy_(started)
        self._is_new = False

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if f"{prefix}kept" in state_dict:
            self._is_new = False

    def cast(self, dtype: torch.dtype) -> None:
        """All parameters in this dtype, also while training."""
        self.in_base_dtype = True
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)

    @torch.no_grad()
    def copy_buffers(self, other: SelectionNetwork) -> None:
        """Take over what defines the other network, of the same configuration, beside its parameters."""
        for mine, theirs in zip(self.buffers(), other.buffers(), strict=True):
            mine.copy_(theirs)

    def logits(self) -> list[torch.Tensor]:
        """float32 [size] for each owner, with the initial bias added; above the threshold a channel is kept."""
        with torch.autocast(self.kept.device.type, enabled=False):
            parameters = dict(self.hypernetwork.named_parameters())
            if any(hasattr(parameter, "full_tensor") for parameter in parameters.values()):
                # Outside a forward under FSDP: all processes ask. ZeRO-3 gathers by itself.
                parameters = {name: parameter.full_tensor() for name, parameter in parameters.items()}
                outputs = functional_call(self.hypernetwork, parameters, ())
            elif all(parameter.dtype == torch.float32 for parameter in parameters.values()):
                outputs = self.hypernetwork()
            else:  # a lower precision is for keeping them, not for computing with them
                tensors = {**parameters, **dict(self.hypernetwork.named_buffers())}
                outputs = functional_call(self.hypernetwork, {name: t.float() for name, t in tensors.items()}, ())
            return [output + self.config.initial_bias for output in outputs]

    def sample(self) -> SampledSelections:
        """Draw gates, and the budget term lambda |ln(T / budget)| of the same draw, both with gradients."""
        self._is_new = False
        draw = ESTIMATORS[self.config.estimator]
        samples = [draw(z, self.temperature, self.config.gumbel_temperature) for z in self.logits()]
        counted = [sample.counted.sum() for sample in samples]
        full = counted[0].detach()
        widths = torch.stack([torch.stack([full.new_tensor(float(w)) if isinstance(w, int) else w for w in row])
                              for row in self.plan.widths(counted)])  # fmt: skip
        ratio = self.layout.parameters(widths) / self.layout.total
        penalty = self.regularization * (ratio.log() - math.log(self.keep_share)).abs()
        return SampledSelections(self.plan.expand([s.gates for s in samples]), penalty, ratio.detach())

    @property
    def width_multiple(self) -> int:
        """What every width is a multiple of."""
        return multiple_of(self.config.width_multiple, self.layout.hidden_size)

    @torch.no_grad()
    def threshold_ratio(self) -> float:
        """The part of the weights that stays if every channel above the threshold does."""
        return self.plan.parameters(self._threshold_widths(self.logits())) / self.layout.total

    def _threshold_widths(self, logits: list[torch.Tensor]) -> list[int]:
        threshold, config = THRESHOLDS[self.config.estimator], self.config
        return [
            rounded_width(int((z > threshold).sum()), len(z), self.width_multiple, config.min_width) for z in logits
        ]

    def hardened(self) -> list[torch.Tensor]:
        """The channels that stay, bool [size] on the CPU for each owner; the same answer for the same parameters.

        Raises:
            BudgetError: the least widths exceed the budget.
            UndecidableError: the logits are not finite.
        """
        return self._decision().masks

    def hardened_gates(self) -> list[torch.Tensor | None]:
        """Hardened gates for every selection [5 * layers]; None where everything is kept.

        With gradients on they pass them to the logits as if they were sigmoid(z) (straight through), unless the choice
        was made for good.
        """
        if not torch.is_grad_enabled() or self.is_hardened:
            return self.plan.expand(self._decision().gates)
        logits = self.logits()
        soft = [torch.sigmoid(z) for z in logits]
        hard = [mask.to(z.device).float() for mask, z in zip(self._decision(logits).masks, logits, strict=True)]
        return self.plan.expand([h + (p - p.detach()) for h, p in zip(hard, soft, strict=True)])

    # In inference mode too the gates are ordinary tensors: a forward with gradients may use them later.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _decision(self, logits: list[torch.Tensor] | None = None) -> _Decision:
        """Masks and gates of the owners.

        Sorting the logits and filling the budget takes longer than the forward of a small model, and an evaluation asks
        for the same choice again and again. It is made anew unless the numbers that it follows from are equal to those
        of the last time, all of them. Nothing tells reliably that a parameter was not written to: fused and 8-bit
        optimisers do not raise a tensor's version.
        """
        config, hardened = self.config, self.is_hardened
        if hardened:
            seen = self.kept.clone()
        else:
            logits = self.logits() if logits is None else logits
            seen = torch.cat(logits)
        settings = (hardened, self.budget, config.hardening, self.width_multiple, config.min_width, config.estimator)
        decided = self._decided
        if decided is not None and decided.follows_from(seen, settings):
            return decided
        if hardened:
            masks = [part.bool() for part in seen.cpu().split(list(self.plan.sizes))]
        else:
            if not seen.isfinite().all():
                raise UndecidableError(
                    "the logits of DISP's selections hold NaN or infinity: no choice of channels follows from them"
                )
            masks = best_channels(logits, self._hardened_widths(logits))
        gates = [None if mask.all() else mask.to(seen.device).float() for mask in masks]
        self._decided = _Decision(seen, settings, masks, gates)
        return self._decided

    def _hardened_widths(self, logits: list[torch.Tensor]) -> list[int]:
        if self.config.hardening == "threshold":
            return self._threshold_widths(logits)
        return widths_on_budget(logits, self.plan, self.budget, self.width_multiple, self.config.min_width)

    @torch.no_grad()
    def harden(self) -> None:
        """Make the choice for good: from here on training changes nothing."""
        self.kept.copy_(torch.cat(self.hardened()))

    def masks(self) -> list[dict[str, torch.Tensor]]:
        """For each layer its five hardened masks by name, bool [size] on the CPU."""
        return masks_by_layer(self.plan, self.hardened())
