"""A linear layer whose outputs are added to some channels of the residual.

With `i_j` the j-th entry of the index,

    out_{i_j} = r_{i_j} + (x W^T + b)_j,      out_c = r_c elsewhere
    d r = d out,   d x = d out_i W,   d W = d out_i^T x,   d b = sum of d out_i over rows,   d out_i = d out[:, i]

A pruned block writes so: Gao et al., arXiv 2410.11988, figure 2. In one kernel the product meets the residual in
float32 before anything is rounded, and the channels that stay are not touched.
"""

import torch
import torch.nn.functional as F

from hf_qst_kernels.arguments import as_rows, check_floats, check_index, check_same_dtype, check_shape
from hf_qst_kernels.decisions import linear_index_add_sizes
from hf_qst_kernels.dispatch import autocast_dtype, runs_naive, runs_triton
from hf_qst_kernels.operators import Operator


def linear_index_add(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    index: torch.Tensor,
    residual: torch.Tensor,
    inplace: bool = False,
) -> torch.Tensor:
    """
    `residual` with `x @ weight.T + bias` added to its channels `index`.

    Repeated runs are equal bit by bit. Channels outside `index` keep their bits.

    Args:
        x (`torch.Tensor`): `[..., inputs]`.
        weight (`torch.Tensor`): `[width, inputs]`.
        bias (`torch.Tensor`, *optional*): `[width]`.
        index (`torch.Tensor`): `[width]`, int32 or int64 in `[0, dim)`, distinct. On CUDA that is not checked: the
            Triton kernel leaves out an entry out of range.
        residual (`torch.Tensor`): `[..., dim]`.
        inplace (`bool`): add to `residual` itself and return it; only where no gradient is recorded.

    Returns:
        `torch.Tensor`: `[..., dim]`, in `residual`'s dtype.

    Raises:
        TypeError: a tensor not floating point, `index` not integer, or `x`, `weight` and `bias` of several dtypes.
        ValueError: shapes that do not fit, or `inplace` with a tensor that requires a gradient while gradients are on.
    """
    check_floats(x=x, weight=weight, bias=bias, residual=residual)
    check_index(index)
    if weight.dim() != 2 or x.dim() < 1 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight must be [width, inputs] for x [..., inputs], got {list(weight.shape)}, {list(x.shape)}"
        )
    check_shape("bias", bias, weight.shape[:1], "[width]")
    check_shape("index", index, weight.shape[:1], "[width]")
    if residual.dim() < 1 or residual.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"residual must be {[*x.shape[:-1], 'dim']}, x's shape less its last axis, got {list(residual.shape)}"
        )
    needs_grad = any(t is not None and t.requires_grad for t in (x, weight, bias, residual))
    if inplace and torch.is_grad_enabled() and needs_grad:
        raise ValueError("inplace=True must be called under torch.no_grad(), or with tensors that require no gradient")
    if runs_naive():
        out = naive_linear_index_add(x, weight, bias, index, residual)
        return residual.copy_(out) if inplace else out
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        x, weight, bias = (tensor if tensor is None else tensor.to(dtype) for tensor in (x, weight, bias))
    check_same_dtype(x=x, weight=weight, bias=bias)
    if not inplace:
        return _linear_index_add(x, weight, bias, index, residual)
    _linear_index_add_(x, weight, bias, index, residual)
    return residual


def naive_linear_index_add(x, weight, bias, index, residual, inplace=False):
    """The equation at the top of this file, in float32 at least; never in place."""
    compute = torch.promote_types(residual.dtype, torch.float32)
    y = x.to(compute) @ weight.to(compute).T
    y = y if bias is None else y + bias
    return residual.to(compute).index_add(-1, index, y.to(compute)).to(residual.dtype)  # autocast rounds products


def _added(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, index: torch.Tensor, residual: torch.Tensor
) -> torch.Tensor:
    out = residual.clone(memory_format=torch.contiguous_format)
    _add(x, weight, bias, index, out)
    return out


_linear_index_add = Operator("linear_index_add", _added)


@_linear_index_add.register_fake
def _(x, weight, bias, index, residual):
    return torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)


def _add(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, index: torch.Tensor, residual: torch.Tensor
) -> None:
    """Add to `residual` in its own memory."""
    if x.numel() == 0 and (residual.numel() == 0 or index.numel() == 0):
        return
    rows = x.numel() // max(1, x.shape[-1])
    if _is_rows(residual) and runs_triton("linear_index_add", x, linear_index_add_sizes(rows, weight)):
        from hf_qst_kernels.ops import linear_index_add_triton

        linear_index_add_triton.add_linear(
            as_rows(x), as_rows(weight), bias, index, residual.view(-1, residual.shape[-1])
        )
        return
    with torch.autocast(x.device.type, enabled=False):
        y = F.linear(x, weight, bias).to(residual.dtype)
    if x.device.type == "cpu":
        # A third of the time of index_add_, which with 32-bit indices takes twenty times as long as with 64.
        channels = index.long().expand(*y.shape[:-1], -1)
        residual.scatter_(-1, channels, y.add_(residual.gather(-1, channels)))
    else:
        # One launch. The entries are distinct, so that the result does not depend on the order of its atomics.
        residual.index_add_(-1, index, y)


_linear_index_add_ = Operator("linear_index_add_", _add, mutates_args={"residual"})


@_linear_index_add_.register_fake
def _(x, weight, bias, index, residual):
    return None


def _is_rows(tensor) -> bool:
    """Whether `[..., dim]` can be written through a view `[rows, dim]` with entries side by side."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        return False
    try:
        tensor.view(-1, tensor.shape[-1])
    except RuntimeError:
        return False
    return True


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, index, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, index)


def _backward(ctx, grad):
    x, weight, index = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, _, needs_residual = ctx.needs_input_grad
    # a gather and the library's GEMMs: a GEMM that gathers its columns itself cannot load them in wide words
    selected = grad.index_select(-1, index).to(x.dtype)
    dx = selected @ weight if needs_x else None
    rows = selected.reshape(-1, index.shape[0])
    dw = rows.T @ x.reshape(-1, x.shape[-1]) if needs_weight else None
    db = rows.sum(0).to(ctx.bias_dtype) if needs_bias else None
    return dx, dw, db, None, grad if needs_residual else None


_linear_index_add.register_autograd(_backward, setup_context=_setup_context)
