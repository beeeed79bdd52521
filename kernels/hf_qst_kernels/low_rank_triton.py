"""Triton path of `low_rank_linear`: a program computes h for its rows, keeps it in registers, and writes its outputs."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .dispatch import configuration, interpreted
from .low_rank import MAX_RANK, table_sizes

_HALF = [
    {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4},
    {"BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4},
    {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
]
_FLOAT32 = [{"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}]
CONFIGURATIONS = {"low_rank_linear": _HALF}
# Rows that do not start at 16-byte boundaries are loaded entry by entry, which takes the registers of larger tiles.
UNALIGNED = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2}


@triton.jit
def pair_rows(
    x,
    x_stride,
    down,
    down_stride,
    up,
    up_stride,
    bias,
    out,
    rows,
    inputs,
    rank,
    outputs,
    BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`out[row, j] = (x[row] @ down.T) . up[j] + bias[j]`; `RANK` is `rank` rounded up to a power of 2."""
    row = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    output = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    component = tl.arange(0, RANK).to(tl.int64)
    lane = tl.arange(0, BLOCK_K)
    middle = tl.zeros([BLOCK_M, RANK], tl.float32)
    for start in range(0, inputs, BLOCK_K):
        live = start + lane < inputs
        a = tl.load(
            x + row[:, None] * x_stride + (start + lane)[None, :], mask=(row < rows)[:, None] & live[None, :], other=0.0
        )
        b = tl.load(
            down + component[:, None] * down_stride + (start + lane)[None, :],
            mask=(component < rank)[:, None] & live[None, :],
            other=0.0,
        )
        if UPCAST:  # the interpreter multiplies bfloat16 wrongly
            a, b = a.to(tl.float32), b.to(tl.float32)
        middle = tl.dot(a, tl.trans(b), middle, input_precision="ieee")
    narrow = middle.to(x.dtype.element_ty)
    b = tl.load(
        up + output[:, None] * up_stride + component[None, :],
        mask=(output < outputs)[:, None] & (component < rank)[None, :],
        other=0.0,
    )
    if UPCAST:
        narrow, b = narrow.to(tl.float32), b.to(tl.float32)
    y = tl.dot(narrow, tl.trans(b), input_precision="ieee")
    if BIAS:
        y += tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    mask = (row < rows)[:, None] & (output < outputs)[None, :]
    tl.store(out + row[:, None] * outputs + output[None, :], y.to(out.dtype.element_ty), mask=mask)


def default_configuration(rows: int, dtype: torch.dtype) -> dict:
    """By rows, where nothing was measured."""
    if dtype == torch.float32:
        return _FLOAT32[0]
    return _HALF[0] if rows <= 16 else _HALF[2]


def multiply_pair(x, down, up, bias, out) -> None:
    """
    Fill `out`.

    Args:
        x (`torch.Tensor`): `[rows, inputs]`, entries of a row side by side; float32, bfloat16 or float16.
        down (`torch.Tensor`): `[rank, inputs]`, likewise, rank at most `MAX_RANK`.
        up (`torch.Tensor`): `[outputs, rank]`, likewise.
        bias (`torch.Tensor`): `[outputs]`, or `None`.
        out (`torch.Tensor`): `[rows, outputs]`, contiguous.
    """
    (rows, inputs), (outputs, rank) = x.shape, up.shape
    options = UNALIGNED
    if not (inputs % 16 or rank % 16 or x.stride(0) % 16 or down.stride(0) % 16 or up.stride(0) % 16):
        sizes = table_sizes(rows, inputs, rank, outputs)
        options = configuration("low_rank_linear", x, sizes, default_configuration(rows, x.dtype))
    grid = (triton.cdiv(outputs, options["BLOCK_N"]), triton.cdiv(rows, options["BLOCK_M"]))
    with torch.cuda.device_of(x):
        pair_rows[grid](
            x,
            x.stride(0),
            down,
            down.stride(0),
            up,
            up.stride(0),
            up if bias is None else bias.contiguous(),
            out,
            rows,
            inputs,
            rank,
            outputs,
            BIAS=bias is not None,
            UPCAST=interpreted() and x.dtype == torch.bfloat16,
            RANK=max(16, triton.next_power_of_2(rank)),
            enable_fp_fusion=True,
            **options,
        )


def compiled_cases() -> Iterator[tuple[str, object, dict, dict]]:
    """Name, kernel, argument types and options of every specialisation worth compiling without a device."""
    strides = dict.fromkeys(("x_stride", "down_stride", "up_stride"), "i64:16")
    sizes = {"rows": "i32", "inputs": "i32:16", "rank": "i32:16", "outputs": "i32:16"}
    odd = {name: type_.removesuffix(":16") for name, type_ in (strides | sizes).items()}
    for dtype, candidates in (("bf16", _HALF), ("fp32", _FLOAT32)):
        tensors = dict.fromkeys(("x", "down", "up", "bias", "out"), f"*{dtype}")
        for rank in (16, MAX_RANK[torch.float32 if dtype == "fp32" else torch.bfloat16]):
            types = {**tensors, **strides, **sizes, "BIAS": True, "UPCAST": False, "RANK": rank}
            for options in candidates:
                yield f"low_rank_linear rank {rank} {dtype}", pair_rows, types, options
            yield f"low_rank_linear rank {rank} unaligned {dtype}", pair_rows, {**types, **odd}, UNALIGNED
