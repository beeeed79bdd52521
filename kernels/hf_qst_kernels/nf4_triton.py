"""Triton path of `nf4_linear`: bytes in, weights in registers, two products a tile (even inputs and odd ones)."""

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .dispatch import configuration, interpreted
from .nf4 import table_sizes

_FORWARD = [
    {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 256, "num_warps": 4, "num_stages": 4},
    {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4},
    {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 256, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3},
]
# A program sums over all outputs, so there are only inputs / BLOCK_K of them.
_BACKWARD = [
    {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4},
    {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4},
    {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3},
]
_FLOAT32 = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2}
CONFIGURATIONS = {"nf4_linear": _FORWARD, "nf4_linear_backward": _BACKWARD}


@triton.jit
def _weights(
    packed,
    absmax,
    nested_absmax,
    nested_code,
    nested_offset,
    code,
    output,
    start,
    inputs,
    outputs,
    NESTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """W[output, start : start + BLOCK_K] in float32: even inputs and odd ones, each [BLOCK_N, BLOCK_K / 2]."""
    group = start // 64 + tl.arange(0, BLOCK_K // 64)
    block = output[:, None] * (inputs // 64) + group[None, :]
    known = (output < outputs)[:, None] & (group < inputs // 64)[None, :]
    if NESTED:
        byte = tl.load(absmax + block, mask=known, other=0).to(tl.int32)
        scale = tl.load(nested_code + byte) * tl.load(nested_absmax + block // 256, mask=known, other=0.0)
        scale += tl.load(nested_offset)
    else:
        scale = tl.load(absmax + block, mask=known, other=0.0)
    pair = start // 2 + tl.arange(0, BLOCK_K // 2)
    mask = (output < outputs)[:, None] & (pair < inputs // 2)[None, :]
    byte = tl.load(packed + output[:, None] * (inputs // 2) + pair[None, :], mask=mask, other=0x77).to(tl.int32)
    even = tl.load(code + (byte >> 4))
    odd = tl.load(code + (byte & 15))
    shape: tl.constexpr = [BLOCK_N, BLOCK_K // 64, 32]
    even = tl.reshape(tl.reshape(even, shape) * scale[:, :, None], [BLOCK_N, BLOCK_K // 2])
    odd = tl.reshape(tl.reshape(odd, shape) * scale[:, :, None], [BLOCK_N, BLOCK_K // 2])
    return even, odd


@triton.jit
def nf4_tiles(
    x,
    packed,
    absmax,
    nested_absmax,
    nested_code,
    nested_offset,
    code,
    bias,
    out,
    rows,
    inputs,
    outputs,
    NESTED: tl.constexpr,
    BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`out[row, j] = x[row] . W[j] + bias[j]`."""
    row = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    output = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, inputs, BLOCK_K):
        even, odd = _weights(
            packed,
            absmax,
            nested_absmax,
            nested_code,
            nested_offset,
            code,
            output,
            start,
            inputs,
            outputs,
            NESTED,
            BLOCK_N,
            BLOCK_K,
        )
        mask = (row < rows)[:, None] & (start + lane < inputs)[None, :]
        a = tl.load(x + row[:, None] * inputs + (start + lane)[None, :], mask=mask, other=0.0)
        a_even, a_odd = tl.split(tl.reshape(a, [BLOCK_M, BLOCK_K // 2, 2]))
        even, odd = even.to(x.dtype.element_ty), odd.to(x.dtype.element_ty)
        if UPCAST:  # the interpreter multiplies bfloat16 wrongly
            a_even, a_odd, even, odd = (
                a_even.to(tl.float32),
                a_odd.to(tl.float32),
                even.to(tl.float32),
                odd.to(tl.float32),
            )
        total = tl.dot(a_even, tl.trans(even), total, input_precision="ieee")
        total = tl.dot(a_odd, tl.trans(odd), total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    mask = (row < rows)[:, None] & (output < outputs)[None, :]
    tl.store(out + row[:, None] * outputs + output[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def nf4_transposed_tiles(
    grad,
    packed,
    absmax,
    nested_absmax,
    nested_code,
    nested_offset,
    code,
    out,
    rows,
    inputs,
    outputs,
    NESTED: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`out[row, k] = sum over j of grad[row, j] W[j, k]`, for `BLOCK_K` inputs a program."""
    row = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(0) * BLOCK_K
    lane = tl.arange(0, BLOCK_N)
    sum_even = tl.zeros([BLOCK_M, BLOCK_K // 2], tl.float32)
    sum_odd = tl.zeros([BLOCK_M, BLOCK_K // 2], tl.float32)
    for start in range(0, outputs, BLOCK_N):
        output = (start + lane).to(tl.int64)
        even, odd = _weights(
            packed,
            absmax,
            nested_absmax,
            nested_code,
            nested_offset,
            code,
            output,
            first,
            inputs,
            outputs,
            NESTED,
            BLOCK_N,
            BLOCK_K,
        )
        mask = (row < rows)[:, None] & (output < outputs)[None, :]
        dy = tl.load(grad + row[:, None] * outputs + output[None, :], mask=mask, other=0.0)
        even, odd = even.to(grad.dtype.element_ty), odd.to(grad.dtype.element_ty)
        if UPCAST:
            dy, even, odd = dy.to(tl.float32), even.to(tl.float32), odd.to(tl.float32)
        sum_even = tl.dot(dy, even, sum_even, input_precision="ieee")
        sum_odd = tl.dot(dy, odd, sum_odd, input_precision="ieee")
    total = tl.reshape(tl.join(sum_even, sum_odd), [BLOCK_M, BLOCK_K])
    column = first + tl.arange(0, BLOCK_K)
    mask = (row < rows)[:, None] & (column < inputs)[None, :]
    tl.store(out + row[:, None] * inputs + column[None, :], total.to(out.dtype.element_ty), mask=mask)


@functools.lru_cache(maxsize=64)
def _table(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def default_configuration(decision: str, rows: int, dtype: torch.dtype) -> dict:
    """By rows, where nothing was measured."""
    if dtype == torch.float32:
        return _FLOAT32
    if decision == "nf4_linear_backward":
        return _BACKWARD[0] if rows <= 16 else _BACKWARD[2]
    return _FORWARD[0] if rows <= 16 else _FORWARD[2] if rows <= 32 else _FORWARD[3]


def _nested_pointers(absmax, nested):
    """Where nothing is nested, the kernel wants pointers all the same and reads none of them."""
    return [absmax] * 3 if nested[0] is None else [tensor.contiguous() for tensor in nested]


def multiply(x, packed, absmax, nested, code, bias, out) -> None:
    """
    Fill `out`.

    Args:
        x (`torch.Tensor`): `[rows, inputs]`, contiguous; float32, bfloat16 or float16.
        packed (`torch.Tensor`): uint8, `outputs * inputs / 2` entries.
        absmax (`torch.Tensor`): `[outputs * inputs / 64]`, float32, or uint8 with `nested`.
        nested: its absmax, code table and offset, or three times `None`.
        code (`tuple`): the 16 values of the 4-bit type.
        bias (`torch.Tensor`): `[outputs]`, or `None`.
        out (`torch.Tensor`): `[rows, outputs]`, contiguous.
    """
    (rows, inputs), outputs = x.shape, out.shape[1]
    sizes, default = table_sizes(rows, inputs, outputs), default_configuration("nf4_linear", rows, x.dtype)
    options = dict(configuration("nf4_linear", x, sizes, default))
    grid = (triton.cdiv(outputs, options["BLOCK_N"]), triton.cdiv(rows, options["BLOCK_M"]))
    with torch.cuda.device_of(x):
        nf4_tiles[grid](
            x,
            packed.contiguous(),
            absmax.contiguous(),
            *_nested_pointers(absmax, nested),
            _table(code, x.device),
            out if bias is None else bias.contiguous(),
            out,
            rows,
            inputs,
            outputs,
            NESTED=nested[0] is not None,
            BIAS=bias is not None,
            UPCAST=interpreted() and x.dtype == torch.bfloat16,
            enable_fp_fusion=False,  # the weights round as bitsandbytes' do: product and sum of the scales one by one
            **options,
        )


def multiply_transposed(grad, packed, absmax, nested, code, out) -> None:
    """
    Fill `out`, `[rows, inputs]` and contiguous, with `grad [rows, outputs]`, contiguous, times W; the rest as in `multiply`.
    """
    (rows, outputs), inputs = grad.shape, out.shape[1]
    name = "nf4_linear_backward"
    sizes, default = table_sizes(rows, inputs, outputs), default_configuration(name, rows, grad.dtype)
    options = dict(configuration(name, grad, sizes, default))
    grid = (triton.cdiv(inputs, options["BLOCK_K"]), triton.cdiv(rows, options["BLOCK_M"]))
    with torch.cuda.device_of(grad):
        nf4_transposed_tiles[grid](
            grad,
            packed.contiguous(),
            absmax.contiguous(),
            *_nested_pointers(absmax, nested),
            _table(code, grad.device),
            out,
            rows,
            inputs,
            outputs,
            NESTED=nested[0] is not None,
            UPCAST=interpreted() and grad.dtype == torch.bfloat16,
            enable_fp_fusion=False,
            **options,
        )


def compiled_cases() -> Iterator[tuple[str, object, dict, dict]]:
    """Name, kernel, argument types and options of every specialisation worth compiling without a device."""
    shared = {"packed": "*u8", "nested_absmax": "*fp32", "nested_code": "*fp32", "nested_offset": "*fp32"}
    shared |= {"code": "*fp32", "rows": "i32", "inputs": "i32:16", "outputs": "i32:16", "BIAS": True, "UPCAST": False}
    for dtype in ("bf16", "fp32"):
        types = {**shared, **dict.fromkeys(("x", "grad", "bias", "out"), f"*{dtype}")}
        for nested in (True, False) if dtype == "bf16" else (True,):
            types = {**types, "absmax": "*u8" if nested else "*fp32", "NESTED": nested}
            name = f"{'double' if nested else 'single'} {dtype}"
            for options in _FORWARD if dtype == "bf16" else [_FLOAT32]:
                yield f"nf4_linear {name}", nf4_tiles, types, {**options, "enable_fp_fusion": False}
            for options in _BACKWARD if dtype == "bf16" else [_FLOAT32]:
                yield f"nf4_linear_backward {name}", nf4_transposed_tiles, types, {**options, "enable_fp_fusion": False}
