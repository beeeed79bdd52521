"""A linear layer of a lower rank, `y = (x A^T) B^T + b`, whose product never leaves the chip in between.

    d h = dy B,   d x = d h A,   d A = d h^T x,   d B = dy^T h,   d b = sum of dy over rows,     h = x A^T

`A [rank, inputs]` and `B [outputs, rank]` are the weights of two linear layers. For few rows two GEMMs are two launches;
one kernel is one, but each of its programs computes `h` anew, so that it can win for small ranks only.
"""

import torch
import torch.nn.functional as F

from .arguments import alignment, as_rows, check_floats, check_same_dtype, check_shape
from .dispatch import autocast_all, runs_naive, runs_triton
from .operators import Operator

# The accumulator of h [rows, rank] and its operands have to fit into registers.
MAX_RANK = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 64}


def low_rank_linear(
    x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """
    `(x @ down.T) @ up.T + bias`.

    The product in between is rounded to `x`'s dtype, as that of two linear layers is.

    Args:
        x (`torch.Tensor`): `[..., inputs]`.
        down (`torch.Tensor`): `[rank, inputs]`.
        up (`torch.Tensor`): `[outputs, rank]`. Above a rank of 256 (64 in float32) the op is two GEMMs
            of the library.
        bias (`torch.Tensor`, *optional*): `[outputs]`.

    Returns:
        `torch.Tensor`: `[..., outputs]`.

    Raises:
        TypeError: a tensor not floating point, or several dtypes.
        ValueError: shapes that do not fit.
    """
    check_floats(x=x, down=down, up=up, bias=bias)
    if down.dim() != 2 or x.dim() < 1 or down.shape[1] != x.shape[-1]:
        raise ValueError(f"down must be [rank, inputs] for x [..., inputs], got {list(down.shape)} and {list(x.shape)}")
    if up.dim() != 2 or up.shape[1] != down.shape[0]:
        raise ValueError(
            f"up must be [outputs, rank] for down [rank, inputs], got {list(up.shape)}, {list(down.shape)}"
        )
    check_shape("bias", bias, up.shape[:1], "[outputs]")
    if runs_naive():
        return naive_low_rank_linear(x, down, up, bias)
    x, down, up, bias = autocast_all(x, down, up, bias)
    check_same_dtype(x=x, down=down, up=up, bias=bias)
    return _low_rank_linear(x, down, up, bias)


def naive_low_rank_linear(x, down, up, bias=None):
    """The equation at the top of this file, in float32 at least."""
    compute = torch.promote_types(x.dtype, torch.float32)
    y = (x.to(compute) @ down.to(compute).T) @ up.to(compute).T
    return (y if bias is None else y + bias).to(x.dtype)


def _multiply(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    outputs, rank = up.shape
    sizes = table_sizes(x.numel() // max(1, x.shape[-1]), x.shape[-1], rank, outputs)
    whole = x.numel() and down.numel() and up.numel()
    if whole and rank <= MAX_RANK.get(x.dtype, 0) and runs_triton("low_rank_linear", x, sizes):
        from .low_rank_triton import multiply_pair

        out = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device)
        multiply_pair(as_rows(x), as_rows(down), as_rows(up), bias, out.view(-1, outputs))
        return out
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(F.linear(x, down), up, bias)


_low_rank_linear = Operator("low_rank_linear", _multiply)


def table_sizes(rows: int, inputs: int, rank: int, outputs: int) -> dict[str, int]:
    """What a table's entry says of a call."""
    return {"rows": rows, "inputs": inputs, "rank": rank, "outputs": outputs, "alignment": alignment(inputs, rank)}


@_low_rank_linear.register_fake
def _(x, down, up, bias):
    return torch.empty((*x.shape[:-1], up.shape[0]), dtype=x.dtype, device=x.device)


def _setup_context(ctx, inputs, output) -> None:
    x, down, up, _ = inputs
    ctx.save_for_backward(x, down, up)


def _backward(ctx, grad):
    """The library's GEMMs; h is computed again instead of kept."""
    x, down, up = ctx.saved_tensors
    needs_x, needs_down, needs_up, needs_bias = ctx.needs_input_grad
    dy = grad.reshape(-1, up.shape[0])
    rows = x.reshape(-1, x.shape[-1])
    dh = dy @ up if needs_x or needs_down else None
    return (
        (dh @ down).view(x.shape) if needs_x else None,
        dh.T @ rows if needs_down else None,
        dy.T @ (rows @ down.T) if needs_up else None,
        dy.sum(0) if needs_bias else None,
    )


_low_rank_linear.register_autograd(_backward, setup_context=_setup_context)
