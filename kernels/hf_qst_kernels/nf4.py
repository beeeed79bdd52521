"""A linear layer over bitsandbytes' NF4 weights, dequantised in registers.

With `W` as in `nf4_weight.py`, read as bitsandbytes stores it and rounded to `x`'s dtype before it is multiplied, as
bitsandbytes has it,

    y = x W^T + b,      d x = dy W
"""

import torch
import torch.nn.functional as F

from .arguments import as_rows, check_floats, check_same_dtype, check_shape
from .dispatch import autocast_all, runs_naive, runs_triton
from .nf4_weight import BLOCK, CODE, NF4Weight, check_blocks, check_weight, library_weight, naive_weight
from .operators import Operator, operator


def nf4_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    out_features: int,
    bias: torch.Tensor | None = None,
    nested_absmax: torch.Tensor | None = None,
    nested_code: torch.Tensor | None = None,
    nested_offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    `x @ W.T + bias` for frozen NF4 weights `W [out_features, in_features]`.

    Args:
        x (`torch.Tensor`): `[..., in_features]`; may require a gradient. Its dtype (autocast's, where that is on) is
            that of the product.
        packed, absmax, out_features: of `W`, as in [`NF4Weight`].
        bias (`torch.Tensor`, *optional*): `[out_features]`.
        nested_absmax, nested_code, nested_offset: of `W`, as in [`NF4Weight`]; all three with double quantisation.

    Returns:
        `torch.Tensor`: `[..., out_features]`, in `x`'s dtype.

    Raises:
        TypeError: a dtype other than these.
        ValueError: sizes that do not fit, or some of the nested tensors without the others.
    """
    nested = (nested_absmax, nested_code, nested_offset)
    check_floats(x=x, bias=bias)
    check_blocks("x", x)
    check_weight(NF4Weight(packed, absmax, out_features, *nested), x.shape[-1])
    check_shape("bias", bias, (out_features,), "[out_features]")
    if runs_naive():
        return naive_nf4_linear(x, packed, absmax, out_features, bias, *nested)
    x, bias = autocast_all(x, bias)
    check_same_dtype(x=x, bias=bias)
    return _nf4_linear(x, packed, absmax, out_features, bias, *nested)


def naive_nf4_linear(
    x, packed, absmax, out_features, bias=None, nested_absmax=None, nested_code=None, nested_offset=None
):
    """The equation at the top of this file, in float32 at least, without the rounding of `W`."""
    compute = torch.promote_types(x.dtype, torch.float32)
    weight = naive_weight(NF4Weight(packed, absmax, out_features, nested_absmax, nested_code, nested_offset), compute)
    y = x.to(compute) @ weight.T
    return (y if bias is None else y + bias).to(x.dtype)


def table_sizes(rows: int, inputs: int, outputs: int) -> dict[str, int]:
    """What a table's entry says of a call."""
    return {"rows": rows, "inputs": inputs, "outputs": outputs}


def _multiply(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    out_features: int,
    bias: torch.Tensor | None,
    nested_absmax: torch.Tensor | None,
    nested_code: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
) -> torch.Tensor:
    nested = (nested_absmax, nested_code, nested_offset)
    if x.numel() and runs_triton("nf4_linear", x, table_sizes(x.numel() // x.shape[-1], x.shape[-1], out_features)):
        from .nf4_triton import multiply

        out = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype, device=x.device)
        multiply(as_rows(x).contiguous(), packed, absmax, nested, CODE, bias, out.view(-1, out_features))
        return out
    with torch.autocast(x.device.type, enabled=False):
        if x.is_cuda and x.numel() and hasattr(torch.ops.bitsandbytes, "gemm_4bit"):
            return _library_gemm(x, packed, absmax, out_features, bias, nested)
        return F.linear(x, library_weight(NF4Weight(packed, absmax, out_features, *nested), x.dtype), bias)


def _library_gemm(x, packed, absmax, out_features, bias, nested) -> torch.Tensor:
    """bitsandbytes' own product, since 0.50; it chooses between its fused kernel and a GEMM by itself."""
    shape, packed = [out_features, x.shape[-1]], packed.view(-1, 1)
    if nested[0] is None:
        return torch.ops.bitsandbytes.gemm_4bit(x, packed, shape, absmax, BLOCK, "nf4", bias)
    outer, code, offset = nested
    return torch.ops.bitsandbytes.gemm_4bit(x, packed, shape, outer, BLOCK, "nf4", bias, absmax, code, offset)


_nf4_linear = Operator("nf4_linear", _multiply)


@_nf4_linear.register_fake
def _(x, packed, absmax, out_features, bias, nested_absmax, nested_code, nested_offset):
    return torch.empty((*x.shape[:-1], out_features), dtype=x.dtype, device=x.device)


@operator("nf4_linear_backward")
def _nf4_linear_backward(
    grad: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_code: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
) -> torch.Tensor:
    out_features = grad.shape[-1]
    inputs, nested = 2 * packed.numel() // out_features, (nested_absmax, nested_code, nested_offset)
    sizes = table_sizes(grad.numel() // out_features, inputs, out_features)
    if grad.numel() and runs_triton("nf4_linear_backward", grad, sizes):
        from .nf4_triton import multiply_transposed

        dx = torch.empty((*grad.shape[:-1], inputs), dtype=grad.dtype, device=grad.device)
        multiply_transposed(as_rows(grad).contiguous(), packed, absmax, nested, CODE, dx.view(-1, inputs))
        return dx
    with torch.autocast(grad.device.type, enabled=False):
        return grad @ library_weight(NF4Weight(packed, absmax, out_features, *nested), grad.dtype)


@_nf4_linear_backward.register_fake
def _(grad, packed, absmax, nested_absmax, nested_code, nested_offset):
    inputs = 2 * packed.numel() // grad.shape[-1]
    return torch.empty((*grad.shape[:-1], inputs), dtype=grad.dtype, device=grad.device)


def _setup_context(ctx, inputs, output) -> None:
    _, packed, absmax, _, _, *nested = inputs
    ctx.save_for_backward(packed, absmax, *nested)


def _backward(ctx, grad):
    dx = _nf4_linear_backward(grad, *ctx.saved_tensors) if ctx.needs_input_grad[0] else None
    db = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[4] else None
    return dx, None, None, None, db, None, None, None


_nf4_linear.register_autograd(_backward, setup_context=_setup_context)
