"""The PEFT layer of DISP: it stands in the place of the decoder stack and gates what its blocks read and write."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Mapping, Sequence

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from hf_qst.base_model.decoder_stack import DecoderStack
from hf_qst.disp.auxiliary_loss import with_auxiliary_loss
from hf_qst.disp.selection import UndecidableError
from hf_qst.pruning.layout import SELECTIONS
from hf_qst.pruning.points import selection_points
from hf_qst.tuner.running_forward import RunningForward
from hf_qst.tuner.stack_tuner import StackLayer, with_last_hidden_state

logger = logging.getLogger(__name__)


_Gate = torch.Tensor | None
_BY_INDEX = Sequence[_Gate] | Mapping[int, _Gate]


class _Gates(RunningForward):
    """Where the hooks in the blocks find the gates of the forward that runs in their thread."""

    current: _BY_INDEX | None

    def apply(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` [..., channels] times gate `index`, if there is one."""
        gate = None if self.current is None else self.current[index]
        return hidden if gate is None else hidden * gate.to(hidden.device, hidden.dtype)


class _CheckpointWithGates:
    """Around a block's checkpointing function: the block's gates are arguments of what is checkpointed.

    So recomputing in the backward pass sees the gates of its own forward, and the reentrant kind, which has gradients
    for arguments alone, passes them on.
    """

    def __init__(self, checkpoint, gates: _Gates, first: int):
        self.checkpoint, self.gates, self.first = checkpoint, gates, first

    def __call__(self, function, *args):
        current = self.gates.current
        if current is None:
            return self.checkpoint(function, *args)
        own = [current[self.first + i] for i in range(len(SELECTIONS))]
        return self.checkpoint(functools.partial(self._run, function), *own, *args)

    def _run(self, function, *given):
        own, args = given[: len(SELECTIONS)], given[len(SELECTIONS) :]
        with self.gates.using({self.first + i: gate for i, gate in enumerate(own)}):
            return function(*args)


class DISPLayer(StackLayer):
    """Wraps a decoder stack; in training it draws gates, in evaluation it uses the hardened ones.

    The stack's weights are frozen. Like any module it is in training mode when the model is: its dropout acts, and so
    does NEFTune's noise.
    """

    adapter_layer_names = ("disp_net",)
    method = "DISP"
    alone = "DISP prunes the base's own weights, so they cannot have adapters."
    base_trains = True

    def __init__(self, base_layer: nn.Module, stack: DecoderStack):
        super().__init__(base_layer)
        self.gates = _Gates()
        # Micro-batches in an optimiser step, over which the budget term is a mean; set by the callback, which knows.
        self.accumulation_steps: int | None = None
        # Of the last training forward, for logging: budget term and ratio, scalars.
        self.last_penalty: torch.Tensor | None = None
        self.last_ratio: torch.Tensor | None = None
        # Of merged adapters by name: for each block its masks; and the gates that follow from all of them.
        self.merged_masks: dict[str, list[dict[str, torch.Tensor]]] = {}
        self._merged_gates: list[_Gate] = []
        self.block_path = stack.architecture.blocks
        for i, block in enumerate(stack.blocks):
            self.hook_handles += _install_hooks(block, stack, self.gates, i * len(SELECTIONS))

    @property
    def _blocks(self) -> nn.ModuleList:
        return self.base_layer.get_submodule(self.block_path)

    def forward(self, *args, **kwargs):
        gates, penalty = self._choose()
        if gates is None:
            return self.base_layer(*args, **kwargs)
        kwargs = self.base_arguments(args, kwargs)
        with self.gates.using(gates):
            output = self.base_layer(**kwargs)
        if penalty is None:
            return output
        hidden = with_auxiliary_loss(output[0], penalty.to(output[0].device), 1 / (self.accumulation_steps or 1))
        return with_last_hidden_state(output, hidden)

    @torch.compiler.disable  # small, data-dependent, and partly on the host; the stack itself is compiled
    def _choose(self) -> tuple[list[_Gate] | None, torch.Tensor | None]:
        """The gates of this forward [5 * layers], None without an adapter; in training the budget term, else None."""
        network = self.active_network()
        if network is None:
            if self.merged:
                self.unmerge()
            return None, None
        self._hand_gates_to_checkpoints()
        if self.merged:
            return self._merged_gates, None
        if not (self.training and torch.is_grad_enabled()) or network.is_hardened:
            return network.hardened_gates(), None
        if network.awaits_start:
            _report_missing_start(network.config.start_scores)
        sample = network.sample()
        self.last_penalty, self.last_ratio = sample.penalty.detach(), sample.ratio
        if self.accumulation_steps is None:
            _warn_of_missing_callback()
        return sample.gates, sample.penalty

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """PEFT calls this too, when it has loaded into an adapter that was made without memory (on the meta device)."""
        network = self.networks[adapter_name]
        if device is None:
            device = next(self.base_layer.parameters()).device
        if not any(parameter.is_meta for parameter in network.parameters()):
            network.to(device)

    def _hand_gates_to_checkpoints(self) -> None:
        for i, block in enumerate(self._blocks):
            function = getattr(block, "_gradient_checkpointing_func", None)
            if function is not None and not isinstance(function, _CheckpointWithGates):
                block._gradient_checkpointing_func = _CheckpointWithGates(function, self.gates, i * len(SELECTIONS))

    def remove_hooks(self) -> None:
        super().remove_hooks()
        for block in self._blocks:
            function = getattr(block, "_gradient_checkpointing_func", None)
            if isinstance(function, _CheckpointWithGates):
                block._gradient_checkpointing_func = function.checkpoint

    def train(self, mode: bool = True):
        """As any module; for training the hypernetwork is in float32, unless it was made with autocast_adapter_dtype=False."""
        super().train(mode)
        for network in self.networks.values():
            if mode and not network.in_base_dtype:
                network.float()  # SFTTrainer casts what trains on a quantised base to bfloat16, which loses small steps
        return self

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Keep to the channels that the adapters choose now, without their hypernetworks, until `unmerge`.

        Of several adapters those channels stay that all of them keep. The base's weights are as they were.

        Raises:
            ValueError:
                There is no such adapter, the adapters have no channel in common in some selection, or one's logits are
                not finite. Nothing is merged then.
        """
        chosen = dict(self.merged_masks)
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.networks:
                raise ValueError(f"there is no DISP adapter {name!r}, only {', '.join(self.networks)}")
            try:
                chosen[name] = self.checked(name).masks()
            except UndecidableError as error:  # in PEFT's words; checked without safe_merge too
                broken = f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
                raise ValueError(broken) from error
        common = _common(*chosen.values())
        for i, of_block in enumerate(common):
            for selection, mask in of_block.items():
                if not mask.any():
                    raise ValueError(
                        f"the adapters {', '.join(chosen)} cannot be merged: none of the channels {selection!r} of block "
                        f"{i} is kept by all of them"
                    )
        self.merged_masks, self.merged_adapters = chosen, list(chosen)
        self._set_merged_gates(common)

    def unmerge(self) -> None:
        """Undo `merge`."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        self.merged_masks, self.merged_adapters = {}, []
        self._set_merged_gates([])

    def masks_to_merge(self) -> list[dict[str, torch.Tensor]]:
        """For each block its selections by name that all merged adapters keep, bool [size] on the CPU."""
        return _common(*self.merged_masks.values())

    @torch.inference_mode(False)
    def _set_merged_gates(self, common: list[dict[str, torch.Tensor]]) -> None:
        device = next(self.base_layer.parameters()).device
        masks = [mask for of_block in common for mask in of_block.values()]
        self._merged_gates = [None if mask.all() else mask.to(device).float() for mask in masks]


def _common(*choices: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """What all choices keep."""
    return [
        {name: torch.stack([masks[name] for masks in of_block]).all(0) for name in SELECTIONS}
        for of_block in zip(*choices, strict=True)
    ]


def _install_hooks(block: nn.Module, stack: DecoderStack, gates: _Gates, first: int) -> list:
    """Gates on a block's attention and MLP; `first` is the index of its first selection."""
    points = selection_points(block, stack)
    return [point.hook(functools.partial(gates.apply, first + SELECTIONS.index(point.selection))) for point in points]


@functools.cache
def _warn_of_missing_callback() -> None:
    logger.warning(
        "DISP trains without its DISPCallback: nothing is logged or hardened by itself (call harden() or "
        "merge_and_unload()), and under gradient accumulation the budget term counts once for each micro-batch. "
        "Use trainer.add_callback(DISPCallback())."
    )


@functools.cache
def _report_missing_start(start_scores: str | None) -> None:
    needed = "calibration_data, or DISPCallback, which takes the trainer's data"
    if start_scores is not None:
        raise ValueError(f"DISPConfig.start_scores={start_scores!r} needs {needed}; 'none' starts without data")
    logger.warning(
        "DISP starts with all channels alike, and needs thousands of steps. To start from their Fisher scores, give it %s; "
        "start_scores='none' starts so without this warning.",
        needed,
    )
