"""Triton path of `linear_index_add`: a GEMM whose epilogue reads, adds to and writes the selected channels."""

import torch
import triton
import triton.language as tl

from hf_qst_kernels.decisions import linear_index_add_sizes
from hf_qst_kernels.dispatch import configuration, interpreted

DECODE = [
    {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4},
    {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 256, "num_warps": 4, "num_stages": 4},
    {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4},
]
# A tile of 128 x 128 does not fit, nor one of 128 x 64 in four warps (Triton 3.4, 3.6): the epilogue's 64-bit addresses
# beside its sums take more registers than there are.
PREFILL = [
    {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4},
    {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4},
    {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4},
]
FLOAT32 = [{"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}]
CONFIGURATIONS = {"linear_index_add": [*DECODE, *PREFILL]}
# Rows that do not start at 16-byte boundaries are loaded entry by entry, which takes the registers of larger tiles.
UNALIGNED = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
# Programs that share a strip of the weight run one after another, so that it is read from memory once.
STRIP = tl.constexpr(8)


@triton.jit
def add_linear_tiles(
    x, x_stride, weight, weight_stride, bias, index, residual, residual_stride, rows, inputs, outputs, dim,
    BIAS: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`residual[row, index[j]] += x[row] . weight[j] + bias[j]`; each entry belongs to one program."""
    tile = tl.program_id(0)
    row_tiles = tl.cdiv(rows, BLOCK_M)
    column_tiles = tl.cdiv(outputs, BLOCK_N)
    strip = tile // (STRIP * column_tiles)
    first = strip * STRIP
    strip_height = min(row_tiles - first, STRIP)
    row_tile = first + (tile % (STRIP * column_tiles)) % strip_height
    column_tile = (tile % (STRIP * column_tiles)) // strip_height

    row = row_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    slot = column_tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, inputs, BLOCK_K):
        live = start + lane < inputs
        a = tl.load(
            x + row[:, None] * x_stride + (start + lane)[None, :], mask=(row < rows)[:, None] & live[None, :], other=0.0
        )
        b = tl.load(
            weight + slot[:, None] * weight_stride + (start + lane)[None, :],
            mask=(slot < outputs)[:, None] & live[None, :],
            other=0.0,
        )
        if UPCAST:  # the interpreter multiplies bfloat16 wrongly
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias + slot, mask=slot < outputs, other=0.0).to(tl.float32)[None, :]
    channel = tl.load(index + slot, mask=slot < outputs, other=-1)
    mask = (row < rows)[:, None] & ((channel >= 0) & (channel < dim))[None, :]
    place = residual + row[:, None] * residual_stride + channel[None, :]
    total += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, total.to(residual.dtype.element_ty), mask=mask)


def default_configuration(rows: int, dtype: torch.dtype) -> dict:
    """By rows, where nothing was measured."""
    if dtype == torch.float32:
        return FLOAT32[0]
    if rows <= 64:
        return DECODE[0] if rows <= 16 else DECODE[2]
    return PREFILL[0]


def add_linear(x, weight, bias, index, residual) -> None:
    """Add to `residual [rows, dim]` in place; entries of its rows, `x`'s and `weight`'s lie side by side."""
    rows, inputs = x.shape
    outputs = weight.shape[0]
    options = UNALIGNED
    if not (inputs % 16 or x.stride(0) % 16 or weight.stride(0) % 16):
        sizes, default = linear_index_add_sizes(rows, weight), default_configuration(rows, x.dtype)
        options = configuration("linear_index_add", x, sizes, default)
    grid = (triton.cdiv(rows, options["BLOCK_M"]) * triton.cdiv(outputs, options["BLOCK_N"]),)
    with torch.cuda.device_of(x):
        vectors = weight if bias is None else bias.contiguous(), index.contiguous()
        operands = x, x.stride(0), weight, weight.stride(0), *vectors, residual, residual.stride(0)
        flags = {"BIAS": bias is not None, "UPCAST": interpreted() and x.dtype == torch.bfloat16}
        flags["enable_fp_fusion"] = True
        add_linear_tiles[grid](*operands, rows, inputs, outputs, residual.shape[1], **flags, **options)
