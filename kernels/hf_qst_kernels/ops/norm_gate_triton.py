"""Triton path of `norm_gate`: a program holds whole rows, so that statistics, norm and mix are of one reading."""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from hf_qst_kernels.decisions import norm_gate_sizes
from hf_qst_kernels.dispatch import configuration

# TILE: entries of a program's tile, as many rows as fill it. PROGRAMS: at most so many share the rows in backward; each
# writes sums over its own.
CONFIGURATIONS = {
    "norm_gate": [
        {"TILE": 1024, "num_warps": 4},
        {"TILE": 2048, "num_warps": 4},
        {"TILE": 512, "num_warps": 2},
        {"TILE": 4096, "num_warps": 8},
    ],
    "norm_gate_backward": [
        {"TILE": 1024, "PROGRAMS": 512, "num_warps": 4},
        {"TILE": 2048, "PROGRAMS": 256, "num_warps": 8},
        {"TILE": 2048, "PROGRAMS": 256, "num_warps": 4},
        {"TILE": 4096, "PROGRAMS": 128, "num_warps": 8},
    ],
}
# Rows that do not start at 16-byte boundaries take more registers.
UNALIGNED = {"TILE": 1024, "PROGRAMS": 256, "num_warps": 8}


@triton.jit
def _row_of(tensor, row, stride, column, mask):
    return tl.load(tensor + row[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _gate_of(gate, column, width, VECTOR: tl.constexpr):
    if VECTOR:
        gamma = tl.load(gate + column, mask=column < width, other=0.0).to(tl.float32)
    else:
        gamma = tl.load(gate + column * 0).to(tl.float32)
    return 1.0 / (1.0 + tl.exp(-gamma))


@triton.jit
def _normalised(d, mask, width, eps):
    """Rows in float32, 0 where masked -> the same normalised, and 1 / sqrt(variance + eps) of each."""
    d = tl.where(mask, d - (tl.sum(d, 1) / width)[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(d * d, 1) / width + eps)
    return d * rstd[:, None], rstd


@triton.jit
def norm_gate_rows(
    down, down_stride, side, side_stride, gate, weight, bias, out, rows, width, eps,
    NORM: tl.constexpr, BIAS: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`ROWS` rows of `out`; `WIDTH` is `width` rounded up to a power of 2, `VECTOR` a gate for each channel."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    z = _row_of(down, row, down_stride, column, mask)
    s = _row_of(side, row, side_stride, column, mask)
    beta = _gate_of(gate, column, width, VECTOR)
    if NORM:
        z, _ = _normalised(z, mask, width, eps)
        z *= tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
        if BIAS:
            z += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    y = (1.0 - beta)[None, :] * z + beta[None, :] * s
    tl.store(out + row[:, None] * width + column[None, :], y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def norm_gate_backward_rows(
    grad, grad_stride, down, down_stride, side, side_stride, gate, weight, bias, grad_down, grad_side, sums, rows,
    width, turns, eps,
    NORM: tl.constexpr, BIAS: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradients of rows, `turns` tiles a program, and into `sums[program]` what they add to gate, weight and bias."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    live = column < width
    beta = _gate_of(gate, column, width, VECTOR)
    gate_sum = tl.zeros([ROWS, WIDTH], tl.float32)
    weight_sum = tl.zeros([ROWS, WIDTH], tl.float32)
    bias_sum = tl.zeros([ROWS, WIDTH], tl.float32)
    for turn in range(0, turns):
        row = (program * turns + turn) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & live[None, :]
        place = row[:, None] * width + column[None, :]
        g = _row_of(grad, row, grad_stride, column, mask)
        s = _row_of(side, row, side_stride, column, mask)
        tl.store(grad_side + place, (beta[None, :] * g).to(grad_side.dtype.element_ty), mask=mask)
        z = _row_of(down, row, down_stride, column, mask)
        h = (1.0 - beta)[None, :] * g
        if NORM:
            x, rstd = _normalised(z, mask, width, eps)
            weight_sum += h * x
            bias_sum += h
            w = tl.load(weight + column, mask=live, other=0.0).to(tl.float32)[None, :]
            z = x * w
            if BIAS:
                z += tl.load(bias + column, mask=live, other=0.0).to(tl.float32)[None, :]
            h *= w
            h = (h - (tl.sum(h, 1) / width)[:, None] - x * (tl.sum(h * x, 1) / width)[:, None]) * rstd[:, None]
        gate_sum += g * (s - z)
        tl.store(grad_down + place, h.to(grad_down.dtype.element_ty), mask=mask)
    base = sums + program * 3 * width + column
    tl.store(base, tl.sum(gate_sum, 0) * beta * (1.0 - beta), mask=live)
    tl.store(base + width, tl.sum(weight_sum, 0), mask=live)
    tl.store(base + 2 * width, tl.sum(bias_sum, 0), mask=live)


def launch_options(options: Mapping[str, int], width: int) -> dict[str, int]:
    """How a kernel is launched in one of `CONFIGURATIONS` on rows of this width."""
    wide = triton.next_power_of_2(width)
    return {"ROWS": max(1, options["TILE"] // wide), "WIDTH": wide, "num_warps": options["num_warps"]}


def mix_rows(down, side, gate, weight, bias, out, eps: float) -> None:
    """Fill `out [rows, width]`, contiguous, from `down` and `side` of that shape, entries of a row side by side.

    `gate` is `[1]` or `[width]`; `weight` and `bias [width]` may be `None`.
    """
    rows, width = down.shape
    options = launch_options(_configured("norm_gate", down, side), width)
    with torch.cuda.device_of(down):
        operands = down, down.stride(0), side, side.stride(0), *_vectors(gate, weight, bias), out, rows, width, eps
        grid = (triton.cdiv(rows, options["ROWS"]),)
        norm_gate_rows[grid](*operands, **_flags(gate, weight, bias), enable_fp_fusion=True, **options)


def mix_rows_backward(grad, down, side, gate, weight, bias, grad_down, grad_side, eps: float) -> torch.Tensor:
    """Fill `grad_down` and `grad_side [rows, width]`, contiguous; the other arguments are as in `mix_rows`.

    Returns:
        `torch.Tensor`: float32 `[3, width]`: the gradients in a gate for each channel, in `weight` and in `bias`.
    """
    rows, width = down.shape
    chosen = _configured("norm_gate_backward", grad, down, side)
    options = launch_options(chosen, width)
    tiles = triton.cdiv(rows, options["ROWS"])
    turns = triton.cdiv(tiles, chosen["PROGRAMS"])
    programs = triton.cdiv(tiles, turns)
    sums = torch.empty(programs, 3, width, dtype=torch.float32, device=down.device)
    with torch.cuda.device_of(down):
        inputs = grad, grad.stride(0), down, down.stride(0), side, side.stride(0), *_vectors(gate, weight, bias)
        operands = *inputs, grad_down, grad_side, sums, rows, width, turns, eps
        norm_gate_backward_rows[(programs,)](*operands, **_flags(gate, weight, bias), enable_fp_fusion=True, **options)
    return sums.sum(0)


def _configured(decision: str, *rows: torch.Tensor) -> Mapping[str, int]:
    side = rows[-1]
    if side.shape[1] % 16 or any(tensor.stride(0) % 16 for tensor in rows):
        return UNALIGNED
    return configuration(decision, side, norm_gate_sizes(side), CONFIGURATIONS[decision][0])


def _vectors(gate, weight, bias):
    """Gate, weight and bias as a kernel takes them; any pointer for what it does not read."""
    return [(gate if tensor is None else tensor).contiguous() for tensor in (gate, weight, bias)]


def _flags(gate, weight, bias) -> dict[str, bool]:
    return {"NORM": weight is not None, "BIAS": bias is not None, "VECTOR": gate.shape[0] > 1}
