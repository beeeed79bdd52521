"""A linear map of a frozen hidden state that keeps its input for backward in int8, or as it is.

For `y = (x - c) W^T` with trained `W [out, dim]` and frozen `x` and center `c [dim]` (0 if there is none), backward needs
`x` only for `dW = dy^T (x - c) = dy^T x - (sum of dy over rows) c^T`. Forward uses `x` itself, so `y` is exact; backward
uses the int8 copy `q * s` of `quantize_taps`, and `|dW error|_ij <= sum_t |dy_ti| s_tj / 2`.
"""

import torch
import torch.nn.functional as F

from hf_qst_kernels.arguments import as_rows, check_floats, check_shape
from hf_qst_kernels.decisions import TAP_BLOCK, tap_linear_sizes
from hf_qst_kernels.dispatch import autocast_dtype, interpreted, runs_naive, runs_triton
from hf_qst_kernels.operators import Operator, operator
from hf_qst_kernels.ops.quantize_taps import (
    TINY,
    chunk_rows,
    dequantize_rows,
    empty_quantized,
    naive_dequantize_taps,
    naive_quantize_taps,
    quantize_rows,
)

STORAGES = ("int8", "full")


def tap_linear(
    x: torch.Tensor, weight: torch.Tensor, storage: str = "int8", center: torch.Tensor | None = None
) -> torch.Tensor:
    """
    `(x - center) @ weight.T` for a frozen hidden state `x`, keeping `x` for backward in a fourth of float32's memory.

    The center is subtracted in float32 and the difference rounded once, to the GEMM's dtype: `weight`'s, or autocast's
    where that is on. The weight's gradient is accumulated in float32 and returned in `weight`'s dtype. Nothing is kept
    if `weight` needs no gradient, and no centred or cast copy of all rows is ever made.

    Args:
        x (`torch.Tensor`): `[..., dim]`, the tapped hidden state; must not require a gradient.
        weight (`torch.Tensor`): `[out, dim]`, the projection, trained or not.
        storage (`str`): what is kept for backward. `"int8"`: `dim` bytes and `4 * ceil(dim / 64)` bytes of scales a
            row. `"full"`: `x` itself, in its own dtype, without a copy.
        center (`torch.Tensor`, *optional*): `[dim]`; must not require a gradient.

    Returns:
        `torch.Tensor`: `[..., out]`.

    Raises:
        TypeError: `x`, `weight` or `center` not floating point.
        ValueError: `x` or `center` requires a gradient, shapes that do not fit, or an unknown `storage`.
    """
    if storage not in STORAGES:
        raise ValueError(f"storage must be one of {STORAGES}, got {storage!r}")
    check_floats(x=x, weight=weight, center=center)
    if x.dim() < 1 or x.shape[-1] < 1 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight must be [out, dim] for x [..., dim], got {list(weight.shape)} and {list(x.shape)}")
    check_shape("center", center, x.shape[-1:], "[dim]")
    if torch.is_grad_enabled():
        for name, tensor in (("x", x), ("center", center)):
            if tensor is not None and tensor.requires_grad:
                raise ValueError(
                    f"{name} requires a gradient, which tap_linear does not compute: pass {name}.detach() or use F.linear"
                )
    if runs_naive():
        return naive_tap_linear(x, weight, storage, center)
    compute_dtype = autocast_dtype(x.device.type) or weight.dtype
    keep = torch.is_grad_enabled() and weight.requires_grad
    if not keep and center is None and not x.is_cuda and x.dtype == weight.dtype == compute_dtype and not interpreted():
        return F.linear(x, weight)  # as in `_project_torch`, with less time on the host for each token that is written
    y, _, _ = _tap_linear(x, weight, center, compute_dtype, storage, keep)
    return y


def naive_tap_linear(x, weight, storage="int8", center=None):
    """The equation at the top of this file: the value of `(x - c) W^T`, the gradient of `(q * s - c) W^T`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    c = 0 if center is None else center.to(wide)
    y = (x.to(wide) - c).to(weight.dtype) @ weight.T
    if storage == "full":
        return y
    kept = (naive_dequantize_taps(*naive_quantize_taps(x), wide) - c).to(weight.dtype) @ weight.T
    return kept + (y - kept).detach()


def _project(
    x: torch.Tensor,
    weight: torch.Tensor,
    center: torch.Tensor | None,
    compute_dtype: torch.dtype,
    storage: str,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`y`, and what backward needs of `x` (empty tensors where it needs nothing or `x` itself)."""
    quantized = keep and storage == "int8"
    y = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=compute_dtype, device=x.device)
    out = y.view(-1, weight.shape[0]) if y.numel() else None
    sizes = tap_linear_sizes(x, weight, compute_dtype, quantized, center is not None)
    if runs_triton("tap_linear", x, sizes):
        from hf_qst_kernels.ops import tap_linear_triton

        rows, kept = as_rows(x), (None, None)
        q, scales = empty_quantized(x, TAP_BLOCK) if quantized else _nothing_quantized(x)
        if quantized:
            kept = q.view(rows.shape), scales.view(-1, scales.shape[-1])
        weight = as_rows(weight.to(compute_dtype))
        tap_linear_triton.project_and_quantize(rows, weight, center, out, *kept, TAP_BLOCK, TINY, sizes)
        return y, q, scales
    if out is not None:
        with torch.autocast(x.device.type, enabled=False):
            _project_torch(x.reshape(-1, x.shape[-1]), weight.to(compute_dtype), center, out)
    return y, *(quantize_rows(x, TAP_BLOCK) if quantized else _nothing_quantized(x))


def _project_torch(rows, weight, center, y) -> None:
    """`y = (rows - center) @ weight.T`; rows that have to be centred or cast are so a chunk at a time."""
    if center is None and rows.dtype == weight.dtype:
        torch.mm(rows, weight.t(), out=y)
        return
    if center is not None:
        center = center.to(torch.promote_types(torch.promote_types(rows.dtype, center.dtype), torch.float32))
    chunk = min(chunk_rows(rows), rows.shape[0])
    buffer = torch.empty(chunk, rows.shape[1], dtype=weight.dtype, device=rows.device)
    for start in range(0, rows.shape[0], chunk):
        part = rows[start : start + chunk]
        work = buffer[: part.shape[0]]
        work.copy_(part) if center is None else torch.sub(part, center, out=work)
        torch.mm(work, weight.t(), out=y[start : start + chunk])


_tap_linear = Operator("tap_linear", _project)


@_tap_linear.register_fake
def _(x, weight, center, compute_dtype, storage, keep):
    y = x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=compute_dtype)
    quantized = empty_quantized(x, TAP_BLOCK) if keep and storage == "int8" else _nothing_quantized(x)
    return y, *quantized


def _setup_context(ctx, inputs, output) -> None:
    x, weight, center, _, storage, _ = inputs
    _, q, scales = output
    ctx.mark_non_differentiable(q, scales)
    ctx.set_materialize_grads(False)
    ctx.weight_dtype = weight.dtype
    ctx.save_for_backward(*((q, scales) if storage == "int8" else (x, None)), center)


def _backward(ctx, grad_y, _grad_q, _grad_scales):
    if grad_y is None:
        return (None,) * 6
    return None, _tap_linear_grad_weight(grad_y, *ctx.saved_tensors, ctx.weight_dtype), None, None, None, None


_tap_linear.register_autograd(_backward, setup_context=_setup_context)


@operator("tap_linear_grad_weight")
def _tap_linear_grad_weight(
    grad_y: torch.Tensor,
    kept: torch.Tensor,
    scales: torch.Tensor | None,
    center: torch.Tensor | None,
    weight_dtype: torch.dtype,
) -> torch.Tensor:
    """`grad_y^T (x - c)` in float32 sums over chunks of rows, so that `x` is never dequantised as a whole."""
    out_dim, dim = grad_y.shape[-1], kept.shape[-1]
    sum_dtype = torch.promote_types(grad_y.dtype, torch.float32)
    # CPUs without half precision units multiply half precision matrices many times slower than float32 ones
    gemm_dtype = sum_dtype if grad_y.device.type == "cpu" else grad_y.dtype
    if grad_y.numel() == 0 or kept.numel() == 0:
        return torch.zeros(out_dim, dim, dtype=weight_dtype, device=grad_y.device)
    total = None
    dy = grad_y.reshape(-1, out_dim)
    rows = kept.reshape(-1, dim)
    row_scales = None if scales is None else scales.view(rows.shape[0], -1)
    chunk = rows.shape[0]
    buffer = None
    if row_scales is not None or rows.dtype != gemm_dtype:
        chunk = min(chunk, chunk_rows(rows))
        buffer = torch.empty(chunk, dim, dtype=gemm_dtype, device=grad_y.device)
    with torch.autocast(grad_y.device.type, enabled=False):
        for start in range(0, rows.shape[0], chunk):
            part = rows[start : start + chunk]
            if row_scales is not None:
                part = dequantize_rows(part, row_scales[start : start + chunk], buffer[: part.shape[0]], TAP_BLOCK)
            elif buffer is not None:
                part = buffer[: part.shape[0]].copy_(part)
            dy_part = dy[start : start + chunk].to(gemm_dtype)
            if gemm_dtype == sum_dtype:
                total = torch.mm(dy_part.t(), part) if total is None else total.addmm_(dy_part.t(), part)
            else:
                added = torch.mm(dy_part.t(), part, out_dtype=sum_dtype)
                total = added if total is None else total.add_(added)
        if center is not None:
            total.addr_(dy.sum(0, dtype=sum_dtype), center.to(sum_dtype), alpha=-1)
    return total.to(weight_dtype)


@_tap_linear_grad_weight.register_fake
def _(grad_y, kept, scales, center, weight_dtype):
    return grad_y.new_empty((grad_y.shape[-1], kept.shape[-1]), dtype=weight_dtype)


def _nothing_quantized(x):
    return x.new_empty(0, dtype=torch.int8), x.new_empty(0, dtype=torch.float32)
