"""The places in a block where its selections act."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from hf_qst.base_model.decoder_stack import DecoderStack
from hf_qst.pruning.branch import with_first_argument


@dataclass(frozen=True)
class SelectionPoint:
    """One selection of a block: it acts on what `module` reads, or on what it writes (`reads` is False)."""

    selection: str
    module: nn.Module
    reads: bool

    def hook(self, change: Callable[[torch.Tensor], torch.Tensor]):
        """Put `change(hidden)` in the place of the hidden states [..., channels]; returns the hook's handle."""
        if self.reads:
            return self.module.register_forward_pre_hook(_OnInput(change), with_kwargs=True)
        return self.module.register_forward_hook(_OnOutput(change))


@dataclass(frozen=True)
class _OnInput:
    """A class and no closure, so that models with the hook pickle and deep-copy."""

    change: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, module, args, kwargs):
        return with_first_argument(args, kwargs, self.change)


@dataclass(frozen=True)
class _OnOutput:
    change: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, module, args, output):
        return self.change(output)


def selection_points(block: nn.Module, stack: DecoderStack) -> list[SelectionPoint]:
    """The five selections of a block, in the order of `SELECTIONS`."""
    architecture = stack.architecture
    attention_out = block.get_submodule(architecture.projections.attention_out)
    mlp_out = block.get_submodule(architecture.projections.mlp_out)
    return [
        SelectionPoint("attention_in", block.get_submodule(architecture.attention), True),
        SelectionPoint("attention_out", attention_out, False),
        SelectionPoint("mlp_in", block.get_submodule(architecture.mlp[0]), True),
        # After the activation: there a gated MLP's two branches have met, and a pruned channel still has a gradient.
        SelectionPoint("mlp_middle", mlp_out, True),
        SelectionPoint("mlp_out", mlp_out, False),
    ]
