"""The places in a block where its selections act."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from hf_qst.base_model.architecture import host_of
from hf_qst.base_model.block_calls import with_first_argument
from hf_qst.base_model.decoder_stack import DecoderStack
from hf_qst.base_model.experts import OnOutput, hook_middle


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
        return self.module.register_forward_hook(OnOutput(change))


@dataclass(frozen=True)
class _OnInput:
    """A class and no closure, so that models with the hook pickle and deep-copy."""

    change: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, module, args, kwargs):
        return with_first_argument(args, kwargs, self.change)


class ExpertsMiddle(SelectionPoint):
    """The middle channels of all experts of `module`."""

    def hook(self, change: Callable[[torch.Tensor], torch.Tensor]):
        return hook_middle(self.module, change)


def selection_points(block: nn.Module, stack: DecoderStack) -> list[SelectionPoint]:
    """The selections of a block, in the order of `SELECTIONS`, without those of a half that is not pruned.

    The experts of a mixture and its shared expert have one selection of what they read and one of what they write, so
    that each of these acts in two places.
    """
    names, points = stack.projections(block), []
    if names.attention_out:
        points += [
            ("attention_in", host_of(names.attention_in[0]), True),
            ("attention_out", names.attention_out, False),
        ]
    if names.experts:
        shared_in = [("mlp_in", names.mlp_hosts[0], True)] if names.mlp_out else []
        shared_out = [("mlp_out", names.mlp_out, False)] if names.mlp_out else []
        points += [("mlp_in", names.experts, True), *shared_in, ("mlp_middle", names.experts, False)]
        points += [("mlp_out", names.experts, False), *shared_out]
    elif names.mlp_out:
        # After the activation: there a gated MLP's two branches have met, and a pruned channel still has a gradient.
        middle = ("mlp_middle", names.mlp_out, True)
        points += [("mlp_in", names.mlp_hosts[0], True), middle, ("mlp_out", names.mlp_out, False)]
    kind = lambda name: ExpertsMiddle if names.experts and name == "mlp_middle" else SelectionPoint
    return [kind(name)(name, block.get_submodule(path), reads) for name, path, reads in points]
