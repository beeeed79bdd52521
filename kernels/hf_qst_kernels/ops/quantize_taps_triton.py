"""Triton path of `quantize_taps` and `dequantize_taps`: one read and one write."""

import torch
import triton
import triton.language as tl

# Entries of a program's tile.
TILE = 1024
# 1.5 * 2^23: adding it to a float32 below 2^22 rounds that to an integer, ties to even, as torch.round does.
ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def quantized(values, tiny):
    """Rows of a block [rows, channels] in float32 -> their int8 values (still in float32) and scales [rows]."""
    magnitude = tl.abs(values)
    absmax = tl.max(magnitude, 1)
    # max passes over NaN, which must not come back as a number
    broken = tl.max(tl.where(magnitude < float("inf"), 0, 1), 1)
    absmax = tl.where(broken > 0, float("nan"), absmax)
    factor = tl.where(absmax < tiny, 0.0, tl.div_rn(127.0, absmax))
    scale = tl.where(absmax < tiny, 0.0, tl.div_rn(absmax, 127.0))
    return (values * factor[:, None] + ROUNDER) - ROUNDER, scale


@triton.jit
def quantize_blocks(
    x, x_stride, q, scales, blocks, blocks_per_row, dim, tiny,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """`BLOCKS` blocks of `BLOCK` channels each; `WIDTH` is `BLOCK` rounded up to a power of 2."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    row = block // blocks_per_row
    lane = tl.arange(0, WIDTH)
    column = (block % blocks_per_row)[:, None] * BLOCK + lane[None, :]
    mask = (block < blocks)[:, None] & (lane < BLOCK)[None, :] & (column < dim)

    values = tl.load(x + row[:, None] * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    rounded, scale = quantized(values, tiny)
    tl.store(q + row[:, None] * dim + column, rounded.to(tl.int8), mask=mask)
    tl.store(scales + block, scale, mask=block < blocks)


@triton.jit
def dequantize_blocks(
    q, scales, out, blocks, blocks_per_row, dim,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The same tiles the other way."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    row = block // blocks_per_row
    lane = tl.arange(0, WIDTH)
    column = (block % blocks_per_row)[:, None] * BLOCK + lane[None, :]
    mask = (block < blocks)[:, None] & (lane < BLOCK)[None, :] & (column < dim)

    values = tl.load(q + row[:, None] * dim + column, mask=mask, other=0).to(tl.float32)
    scale = tl.load(scales + block, mask=block < blocks, other=0.0)
    tl.store(out + row[:, None] * dim + column, (values * scale[:, None]).to(out.dtype.element_ty), mask=mask)


def launch_options(block: int) -> dict:
    """Tile shape for a block width. Without fused multiply-add, so that ties round as they do in torch."""
    width = triton.next_power_of_2(block)
    return {"BLOCK": block, "WIDTH": width, "BLOCKS": max(1, TILE // width), "num_warps": 4, "enable_fp_fusion": False}


def quantize_rows(x: torch.Tensor, q: torch.Tensor, scales: torch.Tensor, block: int, tiny: float) -> None:
    """Fill int8 `q [rows, dim]` and float32 `scales [rows, ceil(dim / block)]`, contiguous.

    Blocks whose largest magnitude is below `tiny` become zeros.
    """
    if x.numel() == 0:
        return
    x = x if x.stride(1) == 1 else x.contiguous()
    options = launch_options(block)
    with torch.cuda.device_of(x):
        quantize_blocks[(triton.cdiv(scales.numel(), options["BLOCKS"]),)](
            x, x.stride(0), q, scales, scales.numel(), scales.shape[1], x.shape[1], tiny, **options
        )


def dequantize_rows(q: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, block: int) -> None:
    """Fill `out [rows, dim]`, contiguous, with `q * scales`."""
    if q.numel() == 0:
        return
    options = launch_options(block)
    with torch.cuda.device_of(q):
        dequantize_blocks[(triton.cdiv(scales.numel(), options["BLOCKS"]),)](
            q.contiguous(), scales.contiguous(), out, scales.numel(), scales.shape[1], q.shape[1], **options
        )
