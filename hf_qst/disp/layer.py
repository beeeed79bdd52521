"""The PEFT layer of DISP: it stands in the place of the decoder stack and gates what its blocks read and write."""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from hf_qst.auxiliary_loss import with_auxiliary_loss
from hf_qst.decoder_stack import DecoderStack
from hf_qst.disp.layout import SELECTIONS
from hf_qst.disp.pruned import with_first_argument
from hf_qst.disp.selection import SelectionNetwork
from hf_qst.stack_tuner import StackLayer, with_last_hidden_state

logger = logging.getLogger(__name__)


class _Gates(threading.local):
    """Where the hooks in the blocks find the gates of the forward that runs in their thread; None outside one."""

    current: list[torch.Tensor | None] | None = None

    def __reduce__(self):
        # A copy of a model starts without a running forward.
        return type(self), ()

    @contextmanager
    def using(self, gates: list[torch.Tensor | None]) -> Iterator[None]:
        before, self.current = self.current, gates
        try:
            yield
        finally:
            self.current = before

    def apply(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` [..., channels] times gate `index`, if there is one."""
        gate = None if self.current is None else self.current[index]
        return hidden if gate is None else hidden * gate.to(hidden.device, hidden.dtype)


class _GateInput:
    """Forward pre-hook: gates the hidden states a module reads. A class, so that models pickle and deep-copy."""

    def __init__(self, gates: _Gates, index: int):
        self.gates, self.index = gates, index

    def __call__(self, module, args, kwargs):
        return with_first_argument(args, kwargs, functools.partial(self.gates.apply, self.index))


class _GateOutput:
    """Forward hook: gates what a linear layer writes, its bias included."""

    def __init__(self, gates: _Gates, index: int):
        self.gates, self.index = gates, index

    def __call__(self, module, args, output):
        return self.gates.apply(self.index, output)


class _CheckpointWithGates:
    """Around a block's checkpointing function: recomputing in the backward pass sees the gates of its own forward."""

    def __init__(self, checkpoint, gates: _Gates):
        if getattr(checkpoint, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "gradient_checkpointing_kwargs={'use_reentrant': True} would lose the gates' gradients; "
                "DISP needs use_reentrant=False, the default"
            )
        self.checkpoint, self.gates = checkpoint, gates

    def __call__(self, function, *args):
        return self.checkpoint(functools.partial(self._run, self.gates.current, function), *args)

    def _run(self, gates, function, *args):
        with self.gates.using(gates):
            return function(*args)


class DISPLayer(StackLayer):
    """Wraps a decoder stack; in training it draws gates, in evaluation it uses the hardened ones.

    The stack's weights are frozen and its dropout is off, in training too.
    """

    adapter_layer_names = ("disp_net",)
    method = "DISP"

    def __init__(self, base_layer: nn.Module, stack: DecoderStack):
        super().__init__(base_layer)
        self.gates = _Gates()
        # Micro-batches in an optimiser step, over which the budget term is a mean; set by the callback, which knows.
        self.accumulation_steps: int | None = None
        # Of the last training forward, for logging: budget term and ratio, scalars.
        self.last_penalty: torch.Tensor | None = None
        self.last_ratio: torch.Tensor | None = None
        self.block_path = stack.architecture.blocks
        for i, block in enumerate(stack.blocks):
            self.hook_handles += _install_hooks(block, stack, self.gates, i * len(SELECTIONS))

    @property
    def _blocks(self) -> nn.ModuleList:
        return getattr(self.base_layer, self.block_path)

    def forward(self, *args, **kwargs):
        network = self.active_network()
        if network is None:
            return self.base_layer(*args, **kwargs)
        kwargs = self.base_arguments(args, kwargs)
        if not (self.training and torch.is_grad_enabled()) or network.is_hardened:
            with self.gates.using(network.hardened_gates()):
                return self.base_layer(**kwargs)
        return self._sampled(network, kwargs)

    def _sampled(self, network: SelectionNetwork, kwargs: dict):
        sample = network.sample()
        self._keep_gates_in_checkpoints()
        with self.gates.using(sample.gates):
            output = self.base_layer(**kwargs)
        self.last_penalty, self.last_ratio = sample.penalty.detach(), sample.ratio
        if self.accumulation_steps is None:
            _warn_of_missing_callback()
        penalty = sample.penalty.to(output[0].device)
        hidden = with_auxiliary_loss(output[0], penalty, 1 / (self.accumulation_steps or 1))
        return with_last_hidden_state(output, hidden)

    def _keep_gates_in_checkpoints(self) -> None:
        for block in self._blocks:
            function = getattr(block, "_gradient_checkpointing_func", None)
            if function is not None and not isinstance(function, _CheckpointWithGates):
                block._gradient_checkpointing_func = _CheckpointWithGates(function, self.gates)

    def train(self, mode: bool = True):
        """Training mode for the hypernetwork; the base stays in evaluation mode, without dropout."""
        super().train(mode)
        self.base_layer.eval()
        for network in self.networks.values():
            network.float()  # SFTTrainer casts what trains on a quantised base to bfloat16, which loses small steps
        for block in self._blocks:
            if mode and getattr(block, "gradient_checkpointing", False):
                _require_no_dropout(block)
                block.training = True  # blocks are only checkpointed in training mode
        return self


def _install_hooks(block: nn.Module, stack: DecoderStack, gates: _Gates, first: int) -> list:
    """Gates on a block's attention and MLP; `first` is the index of its first selection."""
    architecture, index = stack.architecture, {name: first + i for i, name in enumerate(SELECTIONS)}
    attention_out = block.get_submodule(architecture.projections.attention_out)
    mlp_out = block.get_submodule(architecture.projections.mlp_out)
    reads = [
        (block.get_submodule(architecture.attention), "attention_in"),
        (block.get_submodule(architecture.mlp[0]), "mlp_in"),
        # After the activation: there a gated MLP's two branches have met, and a pruned channel still has a gradient.
        (mlp_out, "mlp_middle"),
    ]
    writes = [(attention_out, "attention_out"), (mlp_out, "mlp_out")]
    return [
        *(m.register_forward_pre_hook(_GateInput(gates, index[name]), with_kwargs=True) for m, name in reads),
        *(m.register_forward_hook(_GateOutput(gates, index[name])) for m, name in writes),
    ]


@functools.cache
def _warn_of_missing_callback() -> None:
    logger.warning(
        "DISP trains without its DISPCallback: nothing is logged or hardened by itself (call harden() or "
        "merge_and_unload()), and under gradient accumulation the budget term counts once for each micro-batch. "
        "Use trainer.add_callback(DISPCallback())."
    )


def _require_no_dropout(block: nn.Module) -> None:
    """OPT's blocks drop out by themselves, whatever mode their modules are in."""
    rate = getattr(block, "dropout", 0.0)
    if isinstance(rate, float) and rate > 0 and "dropout" in inspect.getsource(type(block).forward):
        raise ValueError(
            f"gradient checkpointing would switch on the dropout of {type(block).__name__} ({rate}), which DISP learns "
            "without: load the base with config.dropout=0.0"
        )
