"""Triton path of the taps: quantising and dequantising in one read and one write, and all that a tap does with its input
(centring it, the projection, its int8 copy) in one read."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .dispatch import configuration, interpreted
from .taps import BLOCK, MAX_OUTPUTS, MAX_OUTPUTS_UNALIGNED

CONFIGURATIONS = {
    "tap_linear": [
        {"BLOCK_M": 64, "num_warps": 8, "num_stages": 2},
        {"BLOCK_M": 32, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 16, "num_warps": 4, "num_stages": 2},
    ]
}
# Float32 products, and rows that do not start at 16-byte boundaries, take more registers.
SMALL = {"BLOCK_M": 16, "num_warps": 16, "num_stages": 1}
# Entries of a program's tile.
TILE = 1024
# 1.5 * 2^23: adding it to a float32 below 2^22 rounds that to an integer, ties to even, as torch.round does.
ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def _quantized(values, tiny):
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
    x,
    x_stride,
    q,
    scales,
    blocks,
    blocks_per_row,
    dim,
    tiny,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """`BLOCKS` blocks of `BLOCK` channels each; `WIDTH` is `BLOCK` rounded up to a power of 2."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    row = block // blocks_per_row
    lane = tl.arange(0, WIDTH)
    column = (block % blocks_per_row)[:, None] * BLOCK + lane[None, :]
    mask = (block < blocks)[:, None] & (lane < BLOCK)[None, :] & (column < dim)

    values = tl.load(x + row[:, None] * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    rounded, scale = _quantized(values, tiny)
    tl.store(q + row[:, None] * dim + column, rounded.to(tl.int8), mask=mask)
    tl.store(scales + block, scale, mask=block < blocks)


@triton.jit
def dequantize_blocks(
    q,
    scales,
    out,
    blocks,
    blocks_per_row,
    dim,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The same tiles the other way."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    row = block // blocks_per_row
    lane = tl.arange(0, WIDTH)
    column = (block % blocks_per_row)[:, None] * BLOCK + lane[None, :]
    mask = (block < blocks)[:, None] & (lane < BLOCK)[None, :] & (column < dim)

    values = tl.load(q + row[:, None] * dim + column, mask=mask, other=0).to(tl.float32)
    scale = tl.load(scales + block, mask=block < blocks, other=0.0)
    tl.store(out + row[:, None] * dim + column, (values * scale[:, None]).to(out.dtype.element_ty), mask=mask)


@triton.jit
def tap_rows(
    x,
    x_stride,
    weight,
    weight_stride,
    center,
    y,
    q,
    scales,
    rows,
    dim,
    outputs,
    tiny,
    CENTER: tl.constexpr,
    QUANTIZE: tl.constexpr,
    UPCAST: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """`y = (x - c) W^T` and, from the same tiles, x in int8. `WIDTH` is `outputs` rounded up to a power of 2."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    output = tl.arange(0, WIDTH).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for start in range(0, dim, BLOCK):
        live = start + lane < dim
        mask = (row < rows)[:, None] & live[None, :]
        values = tl.load(x + row[:, None] * x_stride + (start + lane)[None, :], mask=mask, other=0.0)
        w_mask = (output < outputs)[:, None] & live[None, :]
        w = tl.load(weight + output[:, None] * weight_stride + (start + lane)[None, :], mask=w_mask, other=0.0)
        if CENTER:
            # beyond the row the weights are 0, whatever the difference
            c = tl.load(center + (start + lane)[None, :], mask=live[None, :], other=0.0)
            a = (values.to(tl.float32) - c).to(w.dtype)
        else:
            a = values.to(w.dtype)
        if UPCAST:  # the interpreter multiplies bfloat16 wrongly
            a, w = a.to(tl.float32), w.to(tl.float32)
        total = tl.dot(a, tl.trans(w), total, input_precision="ieee")
        if QUANTIZE:
            rounded, scale = _quantized(values.to(tl.float32), tiny)
            tl.store(q + row[:, None] * dim + (start + lane)[None, :], rounded.to(tl.int8), mask=mask)
            tl.store(scales + row * tl.cdiv(dim, BLOCK) + start // BLOCK, scale, mask=row < rows)
    mask = (row < rows)[:, None] & (output < outputs)[None, :]
    tl.store(y + row[:, None] * outputs + output[None, :], total.to(y.dtype.element_ty), mask=mask)


def launch_options(block: int) -> dict:
    """Tile shape for a block width. Without fused multiply-add, so that ties round as they do in torch."""
    width = triton.next_power_of_2(block)
    return {"BLOCK": block, "WIDTH": width, "BLOCKS": max(1, TILE // width), "num_warps": 4, "enable_fp_fusion": False}


def quantize_rows(x: torch.Tensor, q: torch.Tensor, scales: torch.Tensor, block: int, tiny: float) -> None:
    """
    Fill `q` and `scales`.

    Args:
        x (`torch.Tensor`): `[rows, dim]`; float32, bfloat16 or float16.
        q (`torch.Tensor`): int8 `[rows, dim]`, contiguous.
        scales (`torch.Tensor`): float32 `[rows, ceil(dim / block)]`, contiguous.
        tiny (`float`): blocks whose largest magnitude is below this become zeros.
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
    """
    Fill `out` with `q * scales`.

    Args:
        q (`torch.Tensor`): int8 `[rows, dim]`.
        scales (`torch.Tensor`): float32 `[rows, ceil(dim / block)]`.
        out (`torch.Tensor`): `[rows, dim]`, contiguous; float32, bfloat16 or float16.
    """
    if q.numel() == 0:
        return
    options = launch_options(block)
    with torch.cuda.device_of(q):
        dequantize_blocks[(triton.cdiv(scales.numel(), options["BLOCKS"]),)](
            q.contiguous(), scales.contiguous(), out, scales.numel(), scales.shape[1], q.shape[1], **options
        )


def project_and_quantize(x, weight, center, y, q, scales, block: int, tiny: float, sizes: dict[str, int]) -> None:
    """
    Fill `y` with `(x - center) @ weight.T`, and `q` and `scales` as `quantize_rows` does, in one pass over `x`.

    Args:
        x (`torch.Tensor`): `[rows, dim]`, entries of a row side by side; float32, bfloat16 or float16.
        weight (`torch.Tensor`): `[outputs, dim]`, likewise; its dtype is that of the product.
        center (`torch.Tensor`): `[dim]`, or `None`.
        y (`torch.Tensor`): `[rows, outputs]`, contiguous.
        q (`torch.Tensor`): int8 `[rows, dim]`, contiguous, or `None` for no int8 copy.
        scales (`torch.Tensor`): float32 `[rows, ceil(dim / block)]`, contiguous; `block` is a power of 2. `None` as `q`.
        sizes (`dict`): what the table was asked with.
    """
    (rows, dim), outputs = x.shape, weight.shape[0]
    options = SMALL
    if weight.dtype != torch.float32 and not (dim % 16 or x.stride(0) % 16 or weight.stride(0) % 16):
        options = configuration("tap_linear", x, sizes, CONFIGURATIONS["tap_linear"][0])
    with torch.cuda.device_of(x):
        tap_rows[(triton.cdiv(rows, options["BLOCK_M"]),)](
            x,
            x.stride(0),
            weight,
            weight.stride(0),
            x if center is None else center.to(torch.float32).contiguous(),
            y,
            y if q is None else q,
            y if q is None else scales,
            rows,
            dim,
            outputs,
            tiny,
            CENTER=center is not None,
            QUANTIZE=q is not None,
            UPCAST=interpreted() and weight.dtype == torch.bfloat16,
            WIDTH=max(16, triton.next_power_of_2(outputs)),
            BLOCK=block,
            enable_fp_fusion=False,  # ties round as in the quantiser above
            **options,
        )


def compiled_cases() -> Iterator[tuple[str, object, dict, dict]]:
    """Name, kernel, argument types and options of every specialisation worth compiling without a device."""
    shape = {"blocks": "i32", "blocks_per_row": "i32", "dim": "i32", "scales": "*fp32", "q": "*i8"}
    for dtype, block in (("bf16", 64), ("fp32", 64), ("fp16", 24)):
        types = {"x": f"*{dtype}", "out": f"*{dtype}", "x_stride": "i64", "tiny": "fp32", **shape}
        yield f"quantize_taps block {block} {dtype}", quantize_blocks, types, launch_options(block)
        yield f"dequantize_taps block {block} {dtype}", dequantize_blocks, types, launch_options(block)
    ones = {**shape, "blocks": 1, "blocks_per_row": 1, "dim": 1, "x": "*fp32", "x_stride": 1, "tiny": "fp32"}
    yield "quantize_taps one number fp32", quantize_blocks, ones, launch_options(64)
    tap = {
        "x_stride": "i64:16",
        "weight_stride": "i64:16",
        "center": "*fp32",
        "q": "*i8",
        "scales": "*fp32",
        "rows": "i32",
        "tiny": "fp32",
    }
    tap |= {"dim": "i32:16", "outputs": "i32:16", "UPCAST": False, "BLOCK": BLOCK}
    odd = {"x_stride": "i64", "weight_stride": "i64", "dim": "i32", "outputs": "i32"}
    uses = (
        ("", True, False),
        (" centered", True, True),
        (" no copy", False, False),
        (" centered no copy", False, True),
    )
    for dtype, options in (("bf16", CONFIGURATIONS["tap_linear"]), ("fp32", [SMALL])):
        for width in (16, MAX_OUTPUTS[torch.float32 if dtype == "fp32" else torch.bfloat16]):
            for use, quantize, center in uses:
                types = {**tap, **dict.fromkeys(("x", "weight", "y"), f"*{dtype}"), "WIDTH": width}
                types |= {"QUANTIZE": quantize, "CENTER": center}
                for option in options:
                    option = {**option, "enable_fp_fusion": False}
                    yield f"tap_linear width {width}{use} {dtype}", tap_rows, types, option
                small, types["WIDTH"] = {**SMALL, "enable_fp_fusion": False}, min(width, MAX_OUTPUTS_UNALIGNED)
                yield f"tap_linear width {types['WIDTH']}{use} unaligned {dtype}", tap_rows, {**types, **odd}, small
