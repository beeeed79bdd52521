"""Downsamplers D_i: a base hidden state [batch, seq, d] to the side network's width d_s = d / r (paper, section 3.2).

Each has two steps. `tap` reads the full-width state while the base runs, and only its result is kept. `finish` turns this
result into the side network's input and may be recomputed in the backward pass. The base's state has no gradient, so only
a trainable `tap` keeps it, for the gradient of its weight, in 8 bits (`hf_qst_kernels.tap_linear`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import hf_qst_kernels


class Downsample(nn.Module):
    """Base class with the affine layer norm and the dropout of all kinds.

    Args:
        side_size: width d_s of the side network.
        layernorm: whether to normalise the result.
        dropout: probability.
    """

    def __init__(self, side_size: int, layernorm: bool, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(side_size) if layernorm else None
        self.dropout = nn.Dropout(dropout)

    def tap(self, hidden: torch.Tensor) -> torch.Tensor:
        """[batch, seq, d] without gradient -> the part of it that is kept."""
        raise NotImplementedError

    def expand(self, tapped: torch.Tensor) -> torch.Tensor:
        """Result of `tap` -> [batch, seq, d_s]."""
        return tapped

    def finish(self, tapped: torch.Tensor) -> torch.Tensor:
        """Result of `tap` -> [batch, seq, d_s], normalised."""
        side = self.expand(tapped)
        if self.norm is not None:
            side = self.norm(side.to(self.norm.weight.dtype))
        return self.dropout(side)

    def mix(
        self, tapped: torch.Tensor, side: torch.Tensor, gate: torch.Tensor, dtype: torch.dtype, fused: bool
    ) -> torch.Tensor:
        """`(1 - sigmoid(gate)) * finish(tapped) + sigmoid(gate) * side`, float32 until it is rounded to `dtype`.

        Args:
            tapped: result of `tap`.
            side: [batch, seq, d_s], the side network's state.
            gate: [1] or [d_s], float32.
            dtype: of the result.
            fused: whether norm, gate and mix run as one op (`hf_qst_kernels.norm_gate`), which has no dropout.
        """
        if fused:
            norm = {} if self.norm is None else {name: getattr(self.norm, name) for name in ("weight", "bias", "eps")}
            return hf_qst_kernels.norm_gate(self.expand(tapped), side, gate, **norm, out_dtype=dtype)
        down = self.finish(tapped)
        return torch.lerp(down.float(), side.float(), torch.sigmoid(gate).expand(down.shape[-1])).to(dtype)


class LinearDownsample(Downsample):
    """D(h) = h W, W [d, d_s]."""

    def __init__(self, hidden_size: int, side_size: int, storage: str, **shared):
        super().__init__(side_size, **shared)
        self.storage = storage
        self.down = nn.Linear(hidden_size, side_size, bias=False)

    def tap(self, hidden):
        return hf_qst_kernels.tap_linear(hidden, self.down.weight, storage=self.storage)


class FactoredDownsample(LinearDownsample):
    """D(h) = f(h L1) L2, L1 [d, m], L2 [m, d_s]; f is the identity (`lora`) or SiLU (`adapter`)."""

    def __init__(self, hidden_size: int, side_size: int, rank: int, activation: bool, **shared):
        super().__init__(hidden_size, side_size, **shared)
        self.down = nn.Linear(hidden_size, rank, bias=False)
        self.up = nn.Linear(rank, side_size, bias=False)
        self.activation = nn.SiLU() if activation else nn.Identity()

    def expand(self, tapped):
        return self.up(self.activation(tapped).to(self.up.weight.dtype))


class PoolDownsample(Downsample):
    """D(h)_j = max or mean of the r channels r*j .. r*j + r - 1, without parameters.

    It uses torch's pooling kernels, because a reduction over windows this narrow takes five times as long on a GPU
    (`docs/kernels.md`); on a CPU only the maximum does.
    """

    def __init__(self, side_size: int, kind: str, **shared):
        super().__init__(side_size, **shared)
        self.kind = kind
        self.side_size = side_size

    def tap(self, hidden):
        if self.kind == "avgpool" and not hidden.is_cuda:
            return hidden.unflatten(-1, (self.side_size, -1)).mean(-1)
        pool = F.max_pool1d if self.kind == "maxpool" else F.avg_pool1d
        # Each position is a batch entry of one channel: pooling takes at most three axes, and only the batch may be empty.
        pooled = pool(hidden.reshape(-1, 1, hidden.shape[-1]), hidden.shape[-1] // self.side_size)
        return pooled.view(*hidden.shape[:-1], self.side_size)


class PrincipalDownsample(Downsample):
    """D(h) = (h - mean) P, with P [d, d_s] fixed: the leading principal directions of the states h.

    Each direction is divided by the standard deviation along it; otherwise the few outlier channels of a large model would
    dominate the layer norm that follows. Before `fit`, the directions are random and orthonormal.
    """

    # Parameters, not buffers, because trainers copy an adapter by its parameters.
    fixed_parameters = ("directions", "mean")

    def __init__(self, hidden_size: int, side_size: int, **shared):
        super().__init__(side_size, **shared)
        directions = torch.empty(side_size, hidden_size)
        nn.init.orthogonal_(directions)
        self.directions = nn.Parameter(directions, requires_grad=False)
        self.mean = nn.Parameter(torch.zeros(hidden_size), requires_grad=False)

    def tap(self, hidden):
        # Nothing is trained here, so nothing is kept for the backward pass.
        return hf_qst_kernels.tap_linear(hidden, self.directions, storage="full", center=self.mean)

    @torch.no_grad()
    def fit(self, mean: torch.Tensor, covariance: torch.Tensor) -> None:
        """Set the projection from the states' mean [d] and covariance [d, d]."""
        values, vectors = torch.linalg.eigh(covariance.double())
        side_size = self.directions.shape[0]
        # eigh sorts ascending. The floor keeps the scale of a direction without variance finite.
        scale = values[-side_size:].clamp_min(values[-1] * 1e-12).clamp_min(1e-30).rsqrt()
        self.directions.copy_((vectors[:, -side_size:] * scale).T.flip(0))
        self.mean.copy_(mean)


def make_downsample(config, hidden_size: int, side_size: int) -> Downsample:
    """The downsampler of a `QSTConfig`."""
    shared = {"layernorm": config.downsample_layernorm, "dropout": config.downsample_dropout}
    kind, rank, storage = config.downsample, config.downsample_rank, config.tap_storage
    if kind == "linear":
        return LinearDownsample(hidden_size, side_size, storage=storage, **shared)
    if kind in ("lora", "adapter"):
        return FactoredDownsample(
            hidden_size, side_size, rank=rank, activation=kind == "adapter", storage=storage, **shared
        )
    if kind == "principal":
        return PrincipalDownsample(hidden_size, side_size, **shared)
    return PoolDownsample(side_size, kind, **shared)
