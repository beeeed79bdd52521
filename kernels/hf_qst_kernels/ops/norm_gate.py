"""A narrow state's norm, a gate and the mix with another state: what a layer of a side network begins with.

For rows `d` and `s [width]`, `x = (d - mean(d)) / sqrt(mean((d - mean(d))^2) + eps)` and `beta = sigmoid(gamma)`,

    z = x w + b                (z = d without a norm),
    y = (1 - beta) z + beta s

and with `g = (1 - beta) dy`, `h = g w` and sums over rows (over channels too, for a gate of one number)

    d s = beta dy,    d gamma = beta (1 - beta) sum(dy (s - z)),    d w = sum(g x),    d b = sum(g),
    d d = (h - mean(h) - x mean(h x)) / sqrt(mean((d - mean(d))^2) + eps)          (d d = g without a norm).

Zhang et al., arXiv 2401.07159, section 3.2: `d` is a downsampled hidden state and `s` the side network's own. Torch takes
a launch for each of norm, sigmoid, casts and mix, and keeps what lies between; here it is one, and the inputs are kept.
"""

import functools

import torch
import torch.nn.functional as F

from hf_qst_kernels.arguments import FLOAT_DTYPES, as_rows, check_floats, check_shape
from hf_qst_kernels.decisions import norm_gate_sizes
from hf_qst_kernels.dispatch import runs_naive, runs_triton
from hf_qst_kernels.operators import Operator, operator


def norm_gate(
    down: torch.Tensor,
    side: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """
    `(1 - sigmoid(gate)) * layer_norm(down) + sigmoid(gate) * side`, computed in float32 and rounded once.

    (On the library path the norm's result has `weight`'s dtype before it is mixed.) Autocast does not change it. Kept for
    backward are the arguments, nothing else.

    Args:
        down (`torch.Tensor`): `[..., width]`.
        side (`torch.Tensor`): `[..., width]`, likewise.
        gate (`torch.Tensor`): `[1]` or `[width]`, before its sigmoid.
        weight (`torch.Tensor`, *optional*): `[width]`, of the norm; without it `down` is not normalised.
        bias (`torch.Tensor`, *optional*): `[width]`, of the norm.
        eps (`float`): added to the variance.
        out_dtype (`torch.dtype`, *optional*): of the result; by default what `down` and `side` promote to.

    Returns:
        `torch.Tensor`: `[..., width]`.

    Raises:
        TypeError: a tensor or `out_dtype` not floating point.
        ValueError: shapes that do not fit, a bias without a weight, or `eps` below 0.
    """
    check_floats(down=down, side=side, gate=gate, weight=weight, bias=bias)
    if down.dim() < 1 or down.shape[-1] < 1:
        raise ValueError(f"down must be [..., width] with width >= 1, got {list(down.shape)}")
    check_shape("side", side, tuple(down.shape), "down's shape")
    if gate.dim() != 1 or gate.shape[0] not in (1, down.shape[-1]):
        raise ValueError(f"gate must be [1] or [width] = [{down.shape[-1]}], got {list(gate.shape)}")
    check_shape("weight", weight, down.shape[-1:], "[width]")
    check_shape("bias", bias, down.shape[-1:], "[width]")
    if weight is None and bias is not None:
        raise ValueError("bias must be None where weight is None, got a tensor")
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    if out_dtype is None:
        out_dtype = torch.promote_types(down.dtype, side.dtype)
    elif out_dtype not in FLOAT_DTYPES:
        raise TypeError(f"out_dtype must be one of {FLOAT_DTYPES}, got {out_dtype}")
    if runs_naive():
        return naive_norm_gate(down, side, gate, weight, bias, eps, out_dtype)
    return _norm_gate(down, side, gate, weight, bias, float(eps), out_dtype)


def naive_norm_gate(down, side, gate, weight=None, bias=None, eps=1e-5, out_dtype=None):
    """The equation at the top of this file, in float32 at least."""
    wide = _wide(down, side, gate, weight, bias)
    z, beta = down.to(wide), torch.sigmoid(gate.to(wide))
    if weight is not None:
        d = z - z.mean(-1, keepdim=True)
        z = d / (d.square().mean(-1, keepdim=True) + eps).sqrt() * weight.to(wide)
        z = z if bias is None else z + bias.to(wide)
    y = (1 - beta) * z + beta * side.to(wide)
    return y.to(torch.promote_types(down.dtype, side.dtype) if out_dtype is None else out_dtype)


def _mix(
    down: torch.Tensor,
    side: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    wide = _wide(down, side, gate, weight, bias)
    if _in_one_kernel("norm_gate", side, wide):
        from hf_qst_kernels.ops import norm_gate_triton

        out = torch.empty(down.shape, dtype=out_dtype, device=down.device)
        norm_gate_triton.mix_rows(as_rows(down), as_rows(side), gate, weight, bias, out.view(-1, out.shape[-1]), eps)
        return out
    width = down.shape[-1]
    with torch.autocast(down.device.type, enabled=False):
        z = down if weight is None else F.layer_norm(down.to(weight.dtype), (width,), weight, _like(bias, weight), eps)
        beta = torch.sigmoid(gate).to(wide).expand(width)
        return torch.lerp(z.to(wide), side.to(wide), beta).to(out_dtype)


_norm_gate = Operator("norm_gate", _mix)


@_norm_gate.register_fake
def _(down, side, gate, weight, bias, eps, out_dtype):
    return torch.empty(down.shape, dtype=out_dtype, device=down.device)


@operator("norm_gate_backward")
def _norm_gate_backward(
    grad: torch.Tensor,
    down: torch.Tensor,
    side: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients in `down` and `side`, and `[3, width]`: those of one gate a channel, of `weight` and of `bias`."""
    wide = _wide(down, side, gate, weight, bias)
    grad_down = torch.empty(down.shape, dtype=down.dtype, device=down.device)
    grad_side = torch.empty(side.shape, dtype=side.dtype, device=side.device)
    rows = [as_rows(tensor) for tensor in (grad, down, side)]
    if _in_one_kernel("norm_gate_backward", side, wide):
        from hf_qst_kernels.ops import norm_gate_triton

        shape = rows[1].shape
        sums = norm_gate_triton.mix_rows_backward(
            *rows, gate, weight, bias, grad_down.view(shape), grad_side.view(shape), eps
        )
        return grad_down, grad_side, sums
    g, d, s = (tensor.to(wide) for tensor in rows)
    beta, z, x = torch.sigmoid(gate.to(wide)), d, d
    if weight is not None:
        d = d - d.mean(-1, keepdim=True)
        rstd = (d.square().mean(-1, keepdim=True) + eps).rsqrt()
        x = d * rstd
        z = x * weight.to(wide) if bias is None else x * weight.to(wide) + bias.to(wide)
    grad_side.copy_((g * beta).view(side.shape))
    grad_gate = (g * (s - z)).sum(0) * (beta * (1 - beta))
    g = g * (1 - beta)
    sums = torch.stack([grad_gate, (g * x).sum(0), g.sum(0)])
    if weight is not None:
        h = g * weight.to(wide)
        g = (h - h.mean(-1, keepdim=True) - x * (h * x).mean(-1, keepdim=True)) * rstd
    grad_down.copy_(g.view(down.shape))
    return grad_down, grad_side, sums


@_norm_gate_backward.register_fake
def _(grad, down, side, gate, weight, bias, eps):
    sums = torch.empty((3, down.shape[-1]), dtype=_wide(down, side, gate, weight, bias), device=down.device)
    return torch.empty(down.shape, dtype=down.dtype, device=down.device), torch.empty_like(side).contiguous(), sums


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.eps, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    down, side, gate, weight, bias = ctx.saved_tensors
    grad_down, grad_side, sums = _norm_gate_backward(grad, down, side, gate, weight, bias, ctx.eps)
    needs = ctx.needs_input_grad
    return (
        grad_down if needs[0] else None,
        grad_side if needs[1] else None,
        sums[0].sum_to_size(gate.shape).to(gate.dtype) if needs[2] else None,
        sums[1].to(weight.dtype) if needs[3] else None,
        sums[2].to(bias.dtype) if needs[4] else None,
        None,
        None,
    )


_norm_gate.register_autograd(_backward, setup_context=_setup_context)


def _in_one_kernel(decision: str, side: torch.Tensor, wide: torch.dtype) -> bool:
    return wide != torch.float64 and runs_triton(decision, side, norm_gate_sizes(side))


def _wide(*tensors: torch.Tensor | None) -> torch.dtype:
    dtypes = [tensor.dtype for tensor in tensors if tensor is not None]
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


def _like(bias, weight):
    return None if bias is None else bias.to(weight.dtype)
