"""Triton path of `tap_linear`: all that a tap does with its input (centring, the projection, the int8 copy) in one read."""

import torch
import triton
import triton.language as tl

from hf_qst_kernels.dispatch import configuration, interpreted
from hf_qst_kernels.ops.quantize_taps_triton import quantized

CONFIGURATIONS = {
    "tap_linear": [
        {"BLOCK_M": 64, "num_warps": 8, "num_stages": 2},
        {"BLOCK_M": 32, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 16, "num_warps": 4, "num_stages": 2},
    ]
}
# Float32 products, and rows that do not start at 16-byte boundaries, take more registers.
SMALL = {"BLOCK_M": 16, "num_warps": 16, "num_stages": 1}


@triton.jit
def tap_rows(
    x, x_stride, weight, weight_stride, center, y, q, scales, rows, dim, outputs, tiny,
    CENTER: tl.constexpr, QUANTIZE: tl.constexpr, UPCAST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
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
            rounded, scale = quantized(values.to(tl.float32), tiny)
            tl.store(q + row[:, None] * dim + (start + lane)[None, :], rounded.to(tl.int8), mask=mask)
            tl.store(scales + row * tl.cdiv(dim, BLOCK) + start // BLOCK, scale, mask=row < rows)
    mask = (row < rows)[:, None] & (output < outputs)[None, :]
    tl.store(y + row[:, None] * outputs + output[None, :], total.to(y.dtype.element_ty), mask=mask)


def project_and_quantize(x, weight, center, y, q, scales, block: int, tiny: float, sizes: dict[str, int]) -> None:
    """Fill `y` with `(x - center) @ weight.T`, and `q` and `scales` as `quantize_rows` does, in one pass over `x`.

    Entries of the rows of `x [rows, dim]` and `weight [outputs, dim]` lie side by side; the product has `weight`'s dtype.
    `center` may be `None`, as may `q` and `scales`; `block` is a power of 2, and `sizes` are those of the lookup.
    """
    (rows, dim), outputs = x.shape, weight.shape[0]
    options = SMALL
    if weight.dtype != torch.float32 and not (dim % 16 or x.stride(0) % 16 or weight.stride(0) % 16):
        options = configuration("tap_linear", x, sizes, CONFIGURATIONS["tap_linear"][0])
    with torch.cuda.device_of(x):
        kept = (y, y) if q is None else (q, scales)
        center = None if center is None else center.to(torch.float32).contiguous()
        inputs = x, x.stride(0), weight, weight.stride(0), x if center is None else center
        tap_rows[(triton.cdiv(rows, options["BLOCK_M"]),)](
            *(*inputs, y, *kept, rows, dim, outputs, tiny),
            CENTER=center is not None,
            QUANTIZE=q is not None,
            UPCAST=interpreted() and weight.dtype == torch.bfloat16,
            WIDTH=max(16, triton.next_power_of_2(outputs)),
            BLOCK=block,
            enable_fp_fusion=False,  # ties round as in the quantiser
            **options,
        )
