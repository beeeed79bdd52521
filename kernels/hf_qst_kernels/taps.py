"""A linear map of a frozen hidden state that keeps its input for backward in int8, or as it is.

For `y = (x - c) W^T` with trained `W [out, dim]` and frozen `x` and center `c [dim]` (0 if there is none), backward needs
`x` only for `dW = dy^T (x - c) = dy^T x - (sum of dy over rows) c^T`. Forward uses `x` itself, so `y` is exact; what is
kept is

    q = round(x / s) in int8,   s = max|x| / 127   for each block of 64 channels of each row,

and `dW` uses `q * s`. Each entry of `q * s` is within `s / 2` of `x`, so `|dW error|_ij <= sum_t |dy_ti| s_tj / 2`.
"""

import torch

from .arguments import FLOAT_DTYPES, alignment, as_rows, check_floats, check_shape
from .dispatch import autocast_dtype, runs_naive, runs_triton
from .operators import Operator, operator

BLOCK = 64
# Blocks whose largest entry is below this are kept as zeros: their scale would not be a normal float32 number.
TINY = 1e-35
STORAGES = ("int8", "full")
# Outputs whose sums a Triton program can keep in registers for all its rows, by the product's dtype.
MAX_OUTPUTS = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 64}
# As many where rows do not start at 16-byte boundaries: loading entry by entry takes registers of its own.
MAX_OUTPUTS_UNALIGNED = 128
# Bytes of float32 input that the torch paths hold at a time. Smaller chunks cost more in calls than caches give back.
CHUNK_BYTES = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}


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
    y, _, _ = _tap_linear(x, weight, center, compute_dtype, storage, keep)
    return y


def quantize_taps(x: torch.Tensor, block: int = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Quantise to int8 with one absmax scale for each `block` channels of each row, rounding to nearest (ties to even).

    Args:
        x (`torch.Tensor`): `[..., dim]`, floating point.
        block (`int`): channels that share a scale; the last block of a row may be shorter.

    Returns:
        `tuple`: int8 `[..., dim]` and float32 scales `[..., ceil(dim / block)]`. Entries of a block whose largest
        magnitude is below 1e-35 become 0. A block with an Inf or NaN comes back as Inf or NaN throughout.

    Raises:
        TypeError: `x` not floating point.
        ValueError: `block` below 1, or `x` without an axis.
    """
    check_floats(x=x)
    if block < 1:
        raise ValueError(f"block must be an integer >= 1, got {block}")
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x must be [..., dim] with dim >= 1, got {list(x.shape)}")
    return (naive_quantize_taps if runs_naive() else _quantize)(x.detach(), block)


def dequantize_taps(
    q: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32, block: int = BLOCK
) -> torch.Tensor:
    """
    Undo `quantize_taps` up to its rounding: `q * scales`, computed in float32 and returned in `dtype`.

    Args:
        q (`torch.Tensor`): int8 `[..., dim]`.
        scales (`torch.Tensor`): float32 `[..., ceil(dim / block)]`.
        dtype (`torch.dtype`): floating point dtype of the result.
        block (`int`): the `block` that `quantize_taps` was given.

    Returns:
        `torch.Tensor`: `[..., dim]`.

    Raises:
        TypeError: `q` not int8, `scales` not float32 or `dtype` not floating point.
        ValueError: shapes that do not fit.
    """
    if q.dtype != torch.int8 or scales.dtype != torch.float32 or dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"q, scales and dtype must be int8, float32 and one of {FLOAT_DTYPES}, "
            f"got {q.dtype}, {scales.dtype} and {dtype}"
        )
    if block < 1:
        raise ValueError(f"block must be an integer >= 1, got {block}")
    if q.dim() < 1 or scales.shape != (*q.shape[:-1], -(-q.shape[-1] // block)):
        raise ValueError(
            f"scales must be [..., ceil(dim / {block})] for q [..., dim], got {list(scales.shape)} and {list(q.shape)}"
        )
    return (naive_dequantize_taps if runs_naive() else _dequantize)(q, scales, dtype, block)


def naive_tap_linear(x, weight, storage="int8", center=None):
    """The equation at the top of this file: the value of `(x - c) W^T`, the gradient of `(q * s - c) W^T`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    c = 0 if center is None else center.to(wide)
    y = (x.to(wide) - c).to(weight.dtype) @ weight.T
    if storage == "full":
        return y
    kept = (naive_dequantize_taps(*naive_quantize_taps(x), wide) - c).to(weight.dtype) @ weight.T
    return kept + (y - kept).detach()


def naive_quantize_taps(x, block=BLOCK):
    """`s = max|x| / 127` and `q = round(x / s)`, block by block, in float32 at least."""
    parts = x.to(torch.promote_types(x.dtype, torch.float32)).split(block, -1)
    largest = torch.stack([part.abs().amax(-1) for part in parts], -1)
    scales = (largest / 127).where(~(largest < TINY), 0.0)
    steps = [torch.round(part / s) for part, s in zip(parts, scales.split(1, -1), strict=True)]
    q = torch.cat([step.where(s != 0, 0.0) for step, s in zip(steps, scales.split(1, -1), strict=True)], -1)
    return q.to(torch.int8), scales.to(torch.float32)


def naive_dequantize_taps(q, scales, dtype=torch.float32, block=BLOCK):
    """`q * s`, block by block."""
    compute = torch.promote_types(dtype, torch.float32)
    parts = zip(q.to(compute).split(block, -1), scales.to(compute).split(1, -1), strict=True)
    return torch.cat([part * s for part, s in parts], -1).to(dtype)


@operator("quantize_taps")
def _quantize(x: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    return _quantize_rows(x, block)


@_quantize.register_fake
def _(x, block):
    return _empty_quantized(x, block)


@operator("dequantize_taps")
def _dequantize(q: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, block: int) -> torch.Tensor:
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    if q.numel():
        _dequantize_rows(
            q.reshape(-1, q.shape[-1]), scales.reshape(-1, scales.shape[-1]), out.view(-1, q.shape[-1]), block
        )
    return out


@_dequantize.register_fake
def _(q, scales, dtype, block):
    return torch.empty(q.shape, dtype=dtype, device=q.device)


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
    sizes = _one_pass_sizes(x, weight, compute_dtype, quantized, center is not None)
    if sizes and runs_triton("tap_linear", x, sizes):
        from .taps_triton import project_and_quantize

        rows, kept = as_rows(x), (None, None)
        q, scales = _empty_quantized(x, BLOCK) if quantized else _nothing_quantized(x)
        if quantized:
            kept = q.view(rows.shape), scales.view(-1, scales.shape[-1])
        project_and_quantize(rows, as_rows(weight.to(compute_dtype)), center, out, *kept, BLOCK, TINY, sizes)
        return y, q, scales
    if out is not None:
        with torch.autocast(x.device.type, enabled=False):
            _project_torch(x.reshape(-1, x.shape[-1]), weight.to(compute_dtype), center, out)
    return y, *(_quantize_rows(x, BLOCK) if quantized else _nothing_quantized(x))


def _project_torch(rows, weight, center, y) -> None:
    """`y = (rows - center) @ weight.T`; rows that have to be centred or cast are so a chunk at a time."""
    if center is None and rows.dtype == weight.dtype:
        torch.mm(rows, weight.t(), out=y)
        return
    if center is not None:
        center = center.to(torch.promote_types(torch.promote_types(rows.dtype, center.dtype), torch.float32))
    chunk = min(_chunk_rows(rows), rows.shape[0])
    buffer = torch.empty(chunk, rows.shape[1], dtype=weight.dtype, device=rows.device)
    for start in range(0, rows.shape[0], chunk):
        part = rows[start : start + chunk]
        work = buffer[: part.shape[0]]
        work.copy_(part) if center is None else torch.sub(part, center, out=work)
        torch.mm(work, weight.t(), out=y[start : start + chunk])


def _one_pass_sizes(x, weight, compute_dtype, quantized, centered) -> dict[str, int] | None:
    """What to ask the table with, `None` where no kernel can compute all that is wanted from one reading of `x`."""
    outputs, dim = weight.shape[0], x.shape[-1]
    most = MAX_OUTPUTS.get(compute_dtype, 0)
    aligned = alignment(dim, *(tensor.stride(-2) for tensor in (x, weight) if tensor.dim() > 1))
    if aligned == 1:
        most = min(most, MAX_OUTPUTS_UNALIGNED)
    if x.numel() == 0 or not 0 < outputs <= most:
        return None
    sizes = {**table_sizes(x.numel() // dim, dim, outputs, quantized, centered), "alignment": aligned}
    # a product in x's own dtype says nothing of one in float32
    return sizes if x.dtype == compute_dtype else {**sizes, "product_bits": 8 * compute_dtype.itemsize}


def table_sizes(rows: int, dim: int, outputs: int, quantized: bool, centered: bool) -> dict[str, int]:
    """What a table's entry says of a call on whole tensors. An entry that names other sizes never speaks for it."""
    sizes = {"rows": rows, "dim": dim, "outputs": outputs, "alignment": alignment(dim)}
    return sizes | ({"quantized": 1} if quantized else {}) | ({"centered": 1} if centered else {})


_tap_linear = Operator("tap_linear", _project)


@_tap_linear.register_fake
def _(x, weight, center, compute_dtype, storage, keep):
    y = x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=compute_dtype)
    quantized = _empty_quantized(x, BLOCK) if keep and storage == "int8" else _nothing_quantized(x)
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
        chunk = min(chunk, _chunk_rows(rows))
        buffer = torch.empty(chunk, dim, dtype=gemm_dtype, device=grad_y.device)
    with torch.autocast(grad_y.device.type, enabled=False):
        for start in range(0, rows.shape[0], chunk):
            part = rows[start : start + chunk]
            if row_scales is not None:
                part = _dequantize_rows(part, row_scales[start : start + chunk], buffer[: part.shape[0]], BLOCK)
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


def _empty_quantized(x, block):
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty((*x.shape[:-1], -(-x.shape[-1] // block)), dtype=torch.float32, device=x.device)
    return q, scales


def _nothing_quantized(x):
    return x.new_empty(0, dtype=torch.int8), x.new_empty(0, dtype=torch.float32)


def _chunk_rows(rows) -> int:
    return max(1, CHUNK_BYTES.get(rows.device.type, CHUNK_BYTES["cuda"]) // (4 * rows.shape[1]))


def _blocks(tensor, scales, block):
    """`tensor` seen as `[rows, blocks, width]` with its scales `[rows, blocks, 1]`: the whole blocks, then the rest."""
    whole = tensor.shape[1] // block
    if whole:
        yield tensor[:, : whole * block].unflatten(1, (whole, block)), scales[:, :whole].unsqueeze(2)
    if whole * block < tensor.shape[1]:
        yield tensor[:, whole * block :].unsqueeze(1), scales[:, whole:].unsqueeze(2)


def _quantize_rows(x, block):
    q, scales = _empty_quantized(x, block)
    rows = x.reshape(-1, x.shape[-1])
    quantize = _quantize_triton if runs_triton("quantize_taps", x) else _quantize_torch
    quantize(rows, q.view(rows.shape), scales.view(rows.shape[0], scales.shape[-1]), block)
    return q, scales


def _quantize_torch(x, q, scales, block) -> None:
    chunk = min(_chunk_rows(x), x.shape[0]) if x.numel() else 1
    buffer = torch.empty(chunk, x.shape[1], dtype=torch.float32, device=x.device)
    for start in range(0, x.shape[0], chunk):
        part = x[start : start + chunk].to(torch.float32)
        work = buffer[: part.shape[0]]
        part_scales = scales[start : start + chunk]
        torch.abs(part, out=work)
        for magnitude, scale in _blocks(work, part_scales, block):
            torch.amax(magnitude, 2, keepdim=True, out=scale)
        # `127.0 / tensor` would multiply by a rounded reciprocal and break near-ties differently from the Triton kernel
        factor = torch.where(part_scales < TINY, 0.0, torch.full_like(part_scales, 127.0) / part_scales)
        part_scales.copy_(torch.where(part_scales < TINY, 0.0, part_scales / 127.0))
        for (values, scale), (scaled, _) in zip(
            _blocks(part, factor, block), _blocks(work, factor, block), strict=True
        ):
            torch.mul(values, scale, out=scaled)
        q[start : start + chunk].copy_(work.round_())


def _quantize_triton(x, q, scales, block) -> None:
    from .taps_triton import quantize_rows

    quantize_rows(x, q, scales, block, TINY)


def _dequantize_rows(q, scales, out, block):
    """`out[rows, dim] = q * scales`, through Triton or torch; returns `out`."""
    if runs_triton("dequantize_taps", out):
        from .taps_triton import dequantize_rows

        dequantize_rows(q, scales, out, block)
        return out
    direct = out.dtype == torch.float32
    chunk = q.shape[0] if direct else min(_chunk_rows(q), q.shape[0])
    buffer = None if direct else torch.empty(chunk, q.shape[1], dtype=torch.float32, device=q.device)
    for start in range(0, q.shape[0], chunk):
        part = slice(start, start + chunk)
        work = out[part] if direct else buffer[: q[part].shape[0]]
        work.copy_(q[part])
        for values, scale in _blocks(work, scales[part], block):
            values.mul_(scale)
        if not direct:
            out[part] = work
    return out
