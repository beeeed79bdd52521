"""Triton path of `norm_index_select`: a few rows a program, read once from memory and again from the cache."""

import torch
import triton
import triton.language as tl

from hf_qst_kernels.decisions import norm_index_select_sizes
from hf_qst_kernels.dispatch import configuration

# Wide rows first: what the launch takes by default, then what tuning tries beside it.
CONFIGURATIONS = {
    decision: [
        {"ROWS": 1, "BLOCK": 1024, "num_warps": 4},
        {"ROWS": 2, "BLOCK": 512, "num_warps": 4},
        {"ROWS": 1, "BLOCK": 2048, "num_warps": 8},
        {"ROWS": 4, "BLOCK": 512, "num_warps": 8},
    ]
    for decision in ("norm_index_select", "norm_index_select_backward")
}


@triton.jit
def _statistics(base, inside, dim, eps, LAYER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Mean (0 for RMSNorm) and 1 / sqrt(variance + eps) of each row; two passes, so that a large mean costs no digits."""
    column = tl.arange(0, BLOCK)
    mean = tl.zeros([ROWS], tl.float32)
    if LAYER:
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, dim, BLOCK):
            mask = inside[:, None] & (start + column < dim)[None, :]
            total += tl.load(base + (start + column)[None, :], mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(total, 1) / dim
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, dim, BLOCK):
        mask = inside[:, None] & (start + column < dim)[None, :]
        h = tl.load(base + (start + column)[None, :], mask=mask, other=0.0).to(tl.float32)
        h = tl.where(mask, h - mean[:, None], 0.0)
        squares += h * h
    return mean, tl.rsqrt(tl.sum(squares, 1) / dim + eps)


@triton.jit
def norm_select_rows(
    hidden, row_stride, weight, bias, index, out, rows, dim, width, eps,
    LAYER: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`out[row, j] = norm(hidden[row])[index[j]]`."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    base = hidden + row[:, None] * row_stride
    mean, rstd = _statistics(base, inside, dim, eps, LAYER, ROWS, BLOCK)
    for start in range(0, width, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        channel = tl.load(index + slot, mask=slot < width, other=-1)
        known = (channel >= 0) & (channel < dim)
        # an entry out of range must not read beside the row, nor come back as a number
        h = tl.load(base + channel[None, :], mask=inside[:, None] & known[None, :], other=float("nan")).to(tl.float32)
        w = tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
        y = (h - mean[:, None]) * rstd[:, None] * w[None, :]
        if BIAS:
            y += tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)[None, :]
        mask = inside[:, None] & (slot < width)[None, :]
        tl.store(out + row[:, None] * width + slot[None, :], y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def norm_select_backward_rows(
    grad, hidden, row_stride, weight, index, place, grad_hidden, rows, dim, width, eps,
    LAYER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient in `hidden`; `place[c]` is where channel c stands in `index`, -1 where it does not: no atomics."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    base = hidden + row[:, None] * row_stride
    mean, rstd = _statistics(base, inside, dim, eps, LAYER, ROWS, BLOCK)
    along = tl.zeros([ROWS, BLOCK], tl.float32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        channel = tl.load(index + slot, mask=slot < width, other=-1)
        known = (channel >= 0) & (channel < dim)
        mask = inside[:, None] & known[None, :]
        h = tl.load(base + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + row[:, None] * width + slot[None, :], mask=mask, other=0.0).to(tl.float32)
        g *= tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)[None, :]
        along += g * (h - mean[:, None]) * rstd[:, None]
        total += g
    along_mean = tl.sum(along, 1) / dim
    total_mean = tl.zeros([ROWS], tl.float32)
    if LAYER:
        total_mean = tl.sum(total, 1) / dim
    for start in range(0, dim, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        mask = inside[:, None] & (channel < dim)[None, :]
        slot = tl.load(place + channel, mask=channel < dim, other=-1)
        kept = inside[:, None] & (slot >= 0)[None, :]
        x = (tl.load(base + channel[None, :], mask=mask, other=0.0).to(tl.float32) - mean[:, None]) * rstd[:, None]
        g = tl.load(grad + row[:, None] * width + slot[None, :], mask=kept, other=0.0).to(tl.float32)
        g *= tl.load(weight + channel, mask=channel < dim, other=0.0).to(tl.float32)[None, :]
        dh = (g - x * along_mean[:, None] - total_mean[:, None]) * rstd[:, None]
        tl.store(grad_hidden + row[:, None] * dim + channel[None, :], dh.to(grad_hidden.dtype.element_ty), mask=mask)


def norm_select(hidden, weight, bias, index, out, eps: float, kind: str) -> None:
    """Fill `out [rows, width]`, contiguous, from `hidden [rows, dim]`, entries of a row side by side; `bias` may be `None`."""
    rows, dim = hidden.shape
    options = _options("norm_index_select", hidden, index)
    with torch.cuda.device_of(hidden):
        parameters = weight.contiguous(), weight if bias is None else bias.contiguous(), index.contiguous()
        operands = hidden, hidden.stride(0), *parameters, out, rows, dim, index.shape[0], eps
        flags = {"LAYER": kind == "layer", "BIAS": bias is not None, "enable_fp_fusion": True}
        norm_select_rows[(triton.cdiv(rows, options["ROWS"]),)](*operands, **flags, **options)


def norm_select_backward(grad, hidden, weight, index, grad_hidden, eps: float, kind: str) -> None:
    """Fill `grad_hidden [rows, dim]` from `grad [rows, width]`, both contiguous; `hidden` as in `norm_select`."""
    rows, dim = hidden.shape
    place = torch.full((dim,), -1, dtype=torch.int32, device=hidden.device)
    place[index.long()] = torch.arange(index.shape[0], dtype=torch.int32, device=hidden.device)
    options = _options("norm_index_select_backward", hidden, index)
    with torch.cuda.device_of(hidden):
        inputs = grad, hidden, hidden.stride(0), weight.contiguous(), index.contiguous(), place
        operands = *inputs, grad_hidden, rows, dim, index.shape[0], eps
        flags = {"LAYER": kind == "layer", "enable_fp_fusion": True}
        norm_select_backward_rows[(triton.cdiv(rows, options["ROWS"]),)](*operands, **flags, **options)


def _options(decision, hidden, index) -> dict:
    return dict(configuration(decision, hidden, norm_index_select_sizes(hidden, index), CONFIGURATIONS[decision][0]))
