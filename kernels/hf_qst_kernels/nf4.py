"""A linear layer over bitsandbytes' NF4 weights, dequantised in registers.

Two weights share a byte, the one of the even input in its high half; blocks of 64 share a scale `a`:

    W_k = code[n_k] a_{k // 64},      y = x W^T + b,      d x = dy W

Dettmers et al., arXiv 2305.14314, section 3. With double quantisation the scales are bytes too, `q`, in blocks of 256:
`a_j = nested_code[q_j] c_{j // 256} + offset`. All of it is read as bitsandbytes stores it. `W_k` is rounded to `x`'s
dtype before it is multiplied, as bitsandbytes has it.
"""

import torch
import torch.nn.functional as F

from .arguments import as_rows, check_floats, check_same_dtype, check_shape
from .dispatch import autocast_all, runs_naive, runs_triton

BLOCK = 64
NESTED_BLOCK = 256
# The 16 values of NF4, quantiles of the normal distribution: arXiv 2305.14314, appendix E.
CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


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

    Of a bitsandbytes `Params4bit` with `quant_state`: `packed` is its data, `absmax` is `quant_state.absmax`, and with
    double quantisation `nested_absmax`, `nested_code` and `nested_offset` are `quant_state.state2.absmax`,
    `quant_state.state2.code` and `quant_state.offset`.

    Args:
        x (`torch.Tensor`): `[..., in_features]`; may require a gradient. Its dtype (autocast's, where that is on) is
            that of the product.
        packed (`torch.Tensor`): uint8, `in_features * out_features / 2` entries, row by row.
        absmax (`torch.Tensor`): `[in_features * out_features / 64]`, float32, or uint8 with double quantisation.
        out_features (`int`): rows of `W`; `in_features` must be a multiple of 64.
        bias (`torch.Tensor`, *optional*): `[out_features]`.
        nested_absmax (`torch.Tensor`, *optional*): `[ceil(len(absmax) / 256)]`, float32.
        nested_code (`torch.Tensor`, *optional*): `[256]`, float32.
        nested_offset (`torch.Tensor`, *optional*): one number, float32.

    Returns:
        `torch.Tensor`: `[..., out_features]`, in `x`'s dtype.

    Raises:
        TypeError: a dtype other than these.
        ValueError: sizes that do not fit, or some of the nested tensors without the others.
    """
    nested = (nested_absmax, nested_code, nested_offset)
    _check(x, packed, absmax, out_features, bias, nested)
    if runs_naive():
        return naive_nf4_linear(x, packed, absmax, out_features, bias, *nested)
    x, bias = autocast_all(x, bias)
    check_same_dtype(x=x, bias=bias)
    return _nf4_linear(x, packed, absmax, out_features, bias, *nested)


def _check(x, packed, absmax, out_features, bias, nested) -> None:
    check_floats(x=x, bias=bias)
    nested_absmax, nested_code, nested_offset = nested
    if x.dim() < 1 or x.shape[-1] < 1 or x.shape[-1] % BLOCK:
        raise ValueError(f"x must be [..., in_features] with in_features a multiple of {BLOCK}, got {list(x.shape)}")
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed must be uint8, got {packed.dtype}")
    weights = x.shape[-1] * out_features
    if out_features < 1 or packed.numel() != weights // 2:
        raise ValueError(
            f"packed must hold out_features * in_features / 2 = {weights // 2} bytes for out_features {out_features}, "
            f"got {packed.numel()}"
        )
    if len({tensor is None for tensor in nested}) > 1:
        raise ValueError("nested_absmax, nested_code and nested_offset must be given together or not at all")
    expected = torch.float32 if nested_absmax is None else torch.uint8
    if absmax.dtype != expected:
        raise TypeError(f"absmax must be {expected} {'without' if nested_absmax is None else 'with'} nested_absmax, "
                        f"got {absmax.dtype}")  # fmt: skip
    check_shape("absmax", absmax, (weights // BLOCK,), "[out_features * in_features / 64]")
    check_shape("bias", bias, (out_features,), "[out_features]")
    if nested_absmax is None:
        return
    check_shape("nested_absmax", nested_absmax, (-(-absmax.numel() // NESTED_BLOCK),), "[ceil(len(absmax) / 256)]")
    check_shape("nested_code", nested_code, (256,), "[256]")
    for name, tensor in (
        ("nested_absmax", nested_absmax),
        ("nested_code", nested_code),
        ("nested_offset", nested_offset),
    ):
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name} must be float32, got {tensor.dtype}")
    if nested_offset.numel() != 1:
        raise ValueError(f"nested_offset must hold one number, got {list(nested_offset.shape)}")


def naive_nf4_linear(
    x, packed, absmax, out_features, bias=None, nested_absmax=None, nested_code=None, nested_offset=None
):
    """The equation at the top of this file, in float32 at least, without the rounding of `W`."""
    compute = torch.promote_types(x.dtype, torch.float32)
    weight = _weight(packed, absmax, out_features, nested_absmax, nested_code, nested_offset, compute)
    y = x.to(compute) @ weight.T
    return (y if bias is None else y + bias).to(x.dtype)


def _scales(absmax, nested_absmax, nested_code, nested_offset, dtype) -> torch.Tensor:
    if nested_absmax is None:
        return absmax.to(dtype)
    outer = nested_absmax.to(dtype).repeat_interleave(NESTED_BLOCK)[: absmax.numel()]
    return nested_code.to(dtype)[absmax.int()] * outer + nested_offset.to(dtype)


def _weight(packed, absmax, out_features, nested_absmax, nested_code, nested_offset, dtype) -> torch.Tensor:
    code = torch.tensor(CODE, dtype=dtype, device=packed.device)
    pairs = packed.reshape(-1)
    values = code[torch.stack([pairs >> 4, pairs & 15], -1).int()].view(-1, BLOCK)
    scales = _scales(absmax, nested_absmax, nested_code, nested_offset, dtype)
    return (values * scales[:, None]).view(out_features, -1)


def _library_weight(packed, absmax, out_features, nested, dtype) -> torch.Tensor:
    """`W` in `dtype`, by bitsandbytes' kernel where that library is loaded (who has its weights has loaded it)."""
    if not hasattr(torch.ops.bitsandbytes, "dequantize_4bit") or dtype == torch.float64:
        compute = torch.promote_types(dtype, torch.float32)
        return _weight(packed, absmax, out_features, *nested, compute).to(dtype)
    scales = _scales(absmax, *nested, torch.float32)
    shape = [out_features, 2 * packed.numel() // out_features]
    return torch.ops.bitsandbytes.dequantize_4bit(packed.view(-1, 1), scales, BLOCK, "nf4", shape, dtype)


def table_sizes(rows: int, inputs: int, outputs: int) -> dict[str, int]:
    """What a table's entry says of a call."""
    return {"rows": rows, "inputs": inputs, "outputs": outputs}


@torch.library.custom_op("hf_qst::nf4_linear", mutates_args=())
def _nf4_linear(
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
        return F.linear(x, _library_weight(packed, absmax, out_features, nested, x.dtype), bias)


def _library_gemm(x, packed, absmax, out_features, bias, nested) -> torch.Tensor:
    """bitsandbytes' own product, since 0.50; it chooses between its fused kernel and a GEMM by itself."""
    shape, packed = [out_features, x.shape[-1]], packed.view(-1, 1)
    if nested[0] is None:
        return torch.ops.bitsandbytes.gemm_4bit(x, packed, shape, absmax, BLOCK, "nf4", bias)
    outer, code, offset = nested
    return torch.ops.bitsandbytes.gemm_4bit(x, packed, shape, outer, BLOCK, "nf4", bias, absmax, code, offset)


@_nf4_linear.register_fake
def _(x, packed, absmax, out_features, bias, nested_absmax, nested_code, nested_offset):
    return torch.empty((*x.shape[:-1], out_features), dtype=x.dtype, device=x.device)


@torch.library.custom_op("hf_qst::nf4_linear_backward", mutates_args=())
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
        return grad @ _library_weight(packed, absmax, out_features, nested, grad.dtype)


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
