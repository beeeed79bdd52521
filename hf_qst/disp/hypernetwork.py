"""Networks whose output is the logits of all selections: nothing of the base goes in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


class HyperNetwork(nn.Module):
    """One embedding for each selection -> bidirectional GRU over all of them -> norm -> GELU -> logits [size] each.

    Gao et al., "DISP-LLM", NeurIPS 2024, arXiv 2410.11988, table 5. The embeddings are drawn once and not trained.

    Args:
        sizes (`Sequence[int]`): channels of each selection, in the order of the layers.
        input_size (`int`): width of an embedding.
        hidden_size (`int`): of the GRU in one direction.
        recurrent (`bool`): with False a linear layer stands in the place of the GRU (the paper's ablation).
    """

    def __init__(self, sizes: Sequence[int], input_size: int, hidden_size: int, recurrent: bool = True):
        super().__init__()
        self.register_buffer("embeddings", torch.randn(len(sizes), input_size))
        if recurrent:
            self.mixer = nn.GRU(input_size, hidden_size, bidirectional=True)
        else:
            self.mixer = nn.Linear(input_size, 2 * hidden_size)
        self.norm = nn.LayerNorm(2 * hidden_size)
        self.heads = nn.ModuleList(nn.Linear(2 * hidden_size, size, bias=False) for size in sizes)

    def features(self) -> torch.Tensor:
        """What the heads read, [selections, 2 * hidden_size]."""
        mixed = self.mixer(self.embeddings)
        return F.gelu(self.norm(mixed[0] if isinstance(self.mixer, nn.GRU) else mixed))

    def forward(self) -> list[torch.Tensor]:
        return [head(row) for head, row in zip(self.heads, self.features(), strict=True)]

    @torch.no_grad()
    def start_at(self, outputs: Sequence[torch.Tensor]) -> None:
        """Change the heads by the least that makes the output this, [size] of each selection."""
        for head, row, wanted in zip(self.heads, self.features(), outputs, strict=True):
            missing = wanted.to(row) - head(row)
            head.weight += torch.outer(missing, row / row.square().sum())


class ElementwiseLogits(nn.Module):
    """No network: every logit is a parameter of its own, from 0 (the paper's ablation).

    At the same learning rate it moves far more slowly than a network; ten times the rate is a fair start.
    """

    def __init__(self, sizes: Sequence[int]):
        super().__init__()
        self.logits = nn.ParameterList(torch.zeros(size) for size in sizes)

    def forward(self) -> list[torch.Tensor]:
        return list(self.logits)

    @torch.no_grad()
    def start_at(self, outputs: Sequence[torch.Tensor]) -> None:
        """Make the output this, [size] of each selection."""
        for logits, wanted in zip(self.logits, outputs, strict=True):
            logits.copy_(wanted)


HYPERNETWORKS = ("gru", "linear", "none")


def make_hypernetwork(kind: str, sizes: Sequence[int], input_size: int, hidden_size: int) -> nn.Module:
    """The network of this kind, one of `HYPERNETWORKS`."""
    if kind == "none":
        return ElementwiseLogits(sizes)
    return HyperNetwork(sizes, input_size, hidden_size, recurrent=kind == "gru")
