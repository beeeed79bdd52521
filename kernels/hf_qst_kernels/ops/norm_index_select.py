"""A norm over the full width of the hidden state of which only some channels are wanted.

With `m = mean(h)` and `v = mean((h - m)^2)` over the row (`m = 0` for RMSNorm), and `i_j` the j-th entry of the index,

    y_j      = x_{i_j} w_{i_j} + b_{i_j},      x = (h - m) / sqrt(v + eps)
    d h      = (g - x mean(g x) - mean(g)) / sqrt(v + eps),      g_{i_j} = w_{i_j} dy_j, 0 elsewhere

(without `mean(g)` for RMSNorm). A pruned block reads its input so: Gao et al., arXiv 2410.11988, figure 2. In one pass
the row is read once and only the selected channels are written.
"""

import torch
import torch.nn.functional as F

from hf_qst_kernels.arguments import as_rows, check_floats, check_index, check_shape
from hf_qst_kernels.decisions import norm_index_select_sizes
from hf_qst_kernels.dispatch import runs_naive, runs_triton
from hf_qst_kernels.operators import Operator, operator

KINDS = ("rms", "layer")


def norm_index_select(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    index: torch.Tensor,
    eps: float = 1e-6,
    kind: str = "rms",
) -> torch.Tensor:
    """
    The channels `index` of RMSNorm or LayerNorm of `hidden`, with the statistics of the full row.

    Statistics and arithmetic are float32, the result has `hidden`'s dtype. Kept for backward is `hidden` itself.

    Args:
        hidden (`torch.Tensor`): `[..., dim]`.
        weight (`torch.Tensor`): `[dim]`. (Gemma's norm multiplies by `1 + weight`: pass that.)
        bias (`torch.Tensor`, *optional*): `[dim]`, with `kind="layer"` only.
        index (`torch.Tensor`): `[width]`, int32 or int64 in `[0, dim)`, distinct. On CUDA that is not checked: what
            an entry out of range selects is NaN in the Triton kernel.
        eps (`float`): added to the mean square, or the variance.
        kind (`str`): `"rms"` or `"layer"`.

    Returns:
        `torch.Tensor`: `[..., width]`.

    Raises:
        TypeError: a tensor not floating point, or `index` not integer.
        ValueError: shapes that do not fit, an unknown `kind`, a bias with `kind="rms"`, or `eps` below 0.
    """
    check_floats(hidden=hidden, weight=weight, bias=bias)
    check_index(index)
    if hidden.dim() < 1 or hidden.shape[-1] < 1:
        raise ValueError(f"hidden must be [..., dim] with dim >= 1, got {list(hidden.shape)}")
    check_shape("weight", weight, hidden.shape[-1:], "[dim]")
    check_shape("bias", bias, hidden.shape[-1:], "[dim]")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    if bias is not None and kind == "rms":
        raise ValueError("bias must be None with kind='rms', got a tensor")
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    if runs_naive():
        return naive_norm_index_select(hidden, weight, bias, index, eps, kind)
    return _norm_index_select(hidden, weight, bias, index, float(eps), kind)


def naive_norm_index_select(hidden, weight, bias, index, eps=1e-6, kind="rms"):
    """The equation at the top of this file, in float32 at least."""
    h = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if kind == "layer":
        h = h - h.mean(-1, keepdim=True)
    x = h / (h.square().mean(-1, keepdim=True) + eps).sqrt()
    y = x * weight if bias is None else x * weight + bias
    return y.index_select(-1, index).to(hidden.dtype)


def _select(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, index: torch.Tensor, eps: float, kind: str
) -> torch.Tensor:
    if runs_triton("norm_index_select", hidden, norm_index_select_sizes(hidden, index)):
        from hf_qst_kernels.ops import norm_index_select_triton

        out = torch.empty((*hidden.shape[:-1], index.shape[0]), dtype=hidden.dtype, device=hidden.device)
        if out.numel():
            norm_index_select_triton.norm_select(
                as_rows(hidden), weight, bias, index, out.view(-1, index.shape[0]), eps, kind
            )
        return out
    with torch.autocast(hidden.device.type, enabled=False):
        if kind == "rms":
            normal = F.rms_norm(hidden, hidden.shape[-1:], weight.to(hidden.dtype), eps)
        else:
            like = [None if p is None else p.to(hidden.dtype) for p in (weight, bias)]
            normal = F.layer_norm(hidden, hidden.shape[-1:], *like, eps)
        return normal.index_select(-1, index)


_norm_index_select = Operator("norm_index_select", _select)


@_norm_index_select.register_fake
def _(hidden, weight, bias, index, eps, kind):
    return torch.empty((*hidden.shape[:-1], index.shape[0]), dtype=hidden.dtype, device=hidden.device)


@operator("norm_index_select_backward")
def _norm_index_select_backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    index: torch.Tensor,
    eps: float,
    kind: str,
    parameters: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients in `hidden`, and with `parameters` in `weight` and the bias, each `[dim]`."""
    dh = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    if not parameters and runs_triton("norm_index_select_backward", hidden, norm_index_select_sizes(hidden, index)):
        from hf_qst_kernels.ops import norm_index_select_triton

        if dh.numel():
            rows = as_rows(hidden)
            norm_index_select_triton.norm_select_backward(
                grad.reshape(-1, index.shape[0]).contiguous(), rows, weight, index, dh.view(rows.shape), eps, kind
            )
        return dh, *_no_parameters(hidden)
    compute = torch.promote_types(hidden.dtype, torch.float32)
    dim, layer, index = hidden.shape[-1], kind == "layer", index.long()
    with torch.autocast(hidden.device.type, enabled=False):
        h, dy = as_rows(hidden).to(compute), grad.reshape(-1, index.shape[0]).to(compute)
        if layer:
            h = h - h.mean(-1, keepdim=True)
        rstd = (h.square().mean(-1, keepdim=True) + eps).rsqrt()
        x = h * rstd
        g = x.new_zeros(x.shape).index_copy_(1, index, dy * weight.to(compute)[index])
        total = g - x * (g * x).mean(-1, keepdim=True)
        if layer:
            total -= g.mean(-1, keepdim=True)
        dh.copy_((total * rstd).view(dh.shape))
        if not parameters:
            return dh, *_no_parameters(hidden)
        dw = x.new_zeros(dim).index_copy_(0, index, (dy * x[:, index]).sum(0))
        db = x.new_zeros(dim).index_copy_(0, index, dy.sum(0))
        return dh, dw, db


@_norm_index_select_backward.register_fake
def _(grad, hidden, weight, index, eps, kind, parameters):
    compute = torch.promote_types(hidden.dtype, torch.float32)
    dh = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    if not parameters:
        return dh, *_no_parameters(hidden)
    return dh, hidden.new_empty(hidden.shape[-1], dtype=compute), hidden.new_empty(hidden.shape[-1], dtype=compute)


def _no_parameters(hidden):
    return hidden.new_empty(0), hidden.new_empty(0)


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, bias, index, ctx.eps, ctx.kind = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(hidden, weight, index)


def _backward(ctx, grad):
    hidden, weight, index = ctx.saved_tensors
    parameters = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    dh, dw, db = _norm_index_select_backward(grad, hidden, weight, index, ctx.eps, ctx.kind, parameters)
    dw = dw.to(weight.dtype) if ctx.needs_input_grad[1] else None
    db = db.to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
    return dh if ctx.needs_input_grad[0] else None, dw, db, None, None, None


_norm_index_select.register_autograd(_backward, setup_context=_setup_context)
