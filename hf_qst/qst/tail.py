"""The tail: low-rank updates of the last blocks of the base, the only ones that a backward pass runs through.

    y = W x + 2 B A x        for each linear layer W of the last k blocks, B zero at the start (Hu et al., LoRA, 2021)

Nothing below the tail is differentiated, so a step costs a forward pass of the base and a backward pass of k blocks. With
k = 0 there is no tail; with k the number of blocks it is LoRA on the whole base. Where the user asked for gradient
checkpointing, a block of the tail keeps its input and computes the rest again in the backward pass.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache

from hf_qst.base_model.linear_layers import dense_shape, is_linear
from hf_qst.tuner.running_forward import ForwardInPlace

SCALE = 2.0
"""LoRA's alpha / r, as QLoRA has it."""


class LowRank(nn.Module):
    """2 B A x for x [..., d_in]; A is [rank, d_in], B [d_out, rank] and zero at the start."""

    def __init__(self, d_in: int, d_out: int, rank: int, zero: bool):
        super().__init__()
        self.down = nn.Linear(d_in, rank, bias=False)
        self.up = nn.Linear(rank, d_out, bias=False)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        if zero:
            nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(x.to(self.down.weight.dtype))) * SCALE


class Tail(nn.Module):
    """The low-rank updates of the base's blocks from number `first` on.

    Args:
        blocks: the base's blocks; only their shapes are used.
        first: the first block of the tail.
        rank: of the updates.
        zero: whether they start at zero.
    """

    def __init__(self, blocks: nn.ModuleList, first: int, rank: int, zero: bool):
        super().__init__()
        self.first = first
        self.updates = nn.ModuleDict()
        for i in range(first, len(blocks)):
            for path, linear in linear_layers(blocks[i]):
                self.updates[key(i, path)] = LowRank(*dense_shape(linear), rank, zero)

    def updates_layer(self, name: str) -> bool:
        return name in self.updates

    def update(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """What is added to the output of the layer called `name` for its input x."""
        return self.updates[name](x)


class CheckpointedForward(ForwardInPlace):
    """The forward of a block that may be in a tail.

    transformers checkpoints blocks in training mode, and those of a frozen base are in evaluation mode. Its own way would
    also miss the updates: they are added by hooks that look for the running forward, which is over in the backward pass.
    """

    def __call__(self, *args, **kwargs):
        running = self.tape.current
        wanted = torch.is_grad_enabled() and getattr(self.block, "gradient_checkpointing", False)
        # With a cache of keys and values, which a second run would write again, nothing is checkpointed.
        if not wanted or running is None or any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
            return self.forward(*args, **kwargs)

        def run(*args, **kwargs):
            with self.tape.using(running):
                return self.forward(*args, **kwargs)

        return checkpoint(run, *args, use_reentrant=False, **kwargs)


def linear_layers(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """The linear layers of a block, quantised ones too, by their paths in it; not routers, which return more than a product."""
    layers = [(path, module) for path, module in block.named_modules() if is_linear(module)]
    return [(path, module) for path, module in layers if "Router" not in type(module).__name__]


def key(index: int, path: str) -> str:
    """The name of a layer's update; names of modules have no dots."""
    return f"{index}_{path.replace('.', '_')}"
