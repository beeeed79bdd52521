"""Int8 copies of hidden states, one scale for each block of channels of each row.

    q = round(x / s) in int8,   s = max|x| / 127   for each block of channels of each row

Each entry of `q * s` is within `s / 2` of `x`.
"""

import torch

from hf_qst_kernels.arguments import FLOAT_DTYPES, check_floats
from hf_qst_kernels.decisions import TAP_BLOCK
from hf_qst_kernels.dispatch import runs_naive, runs_triton
from hf_qst_kernels.operators import operator

# Blocks whose largest entry is below this are kept as zeros: their scale would not be a normal float32 number.
TINY = 1e-35
# Bytes of float32 input that the torch paths hold at a time. Smaller chunks cost more in calls than caches give back.
CHUNK_BYTES = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}


def quantize_taps(x: torch.Tensor, block: int = TAP_BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
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
    q: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32, block: int = TAP_BLOCK
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


def naive_quantize_taps(x, block=TAP_BLOCK):
    """`s = max|x| / 127` and `q = round(x / s)`, block by block, in float32 at least."""
    parts = x.to(torch.promote_types(x.dtype, torch.float32)).split(block, -1)
    largest = torch.stack([part.abs().amax(-1) for part in parts], -1)
    scales = (largest / 127).where(~(largest < TINY), 0.0)
    steps = [torch.round(part / s) for part, s in zip(parts, scales.split(1, -1), strict=True)]
    q = torch.cat([step.where(s != 0, 0.0) for step, s in zip(steps, scales.split(1, -1), strict=True)], -1)
    return q.to(torch.int8), scales.to(torch.float32)


def naive_dequantize_taps(q, scales, dtype=torch.float32, block=TAP_BLOCK):
    """`q * s`, block by block."""
    compute = torch.promote_types(dtype, torch.float32)
    parts = zip(q.to(compute).split(block, -1), scales.to(compute).split(1, -1), strict=True)
    return torch.cat([part * s for part, s in parts], -1).to(dtype)


@operator("quantize_taps")
def _quantize(x: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_rows(x, block)


@_quantize.register_fake
def _(x, block):
    return empty_quantized(x, block)


@operator("dequantize_taps")
def _dequantize(q: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, block: int) -> torch.Tensor:
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    if q.numel():
        dequantize_rows(
            q.reshape(-1, q.shape[-1]), scales.reshape(-1, scales.shape[-1]), out.view(-1, q.shape[-1]), block
        )
    return out


@_dequantize.register_fake
def _(q, scales, dtype, block):
    return torch.empty(q.shape, dtype=dtype, device=q.device)


def quantize_rows(x, block):
    """`q` and `scales` of `x [..., dim]`, through Triton or torch."""
    q, scales = empty_quantized(x, block)
    rows = x.reshape(-1, x.shape[-1])
    arguments = rows, q.view(rows.shape), scales.view(rows.shape[0], scales.shape[-1]), block
    if runs_triton("quantize_taps", x):
        from hf_qst_kernels.ops import quantize_taps_triton

        quantize_taps_triton.quantize_rows(*arguments, TINY)
    else:
        _quantize_torch(*arguments)
    return q, scales


def _quantize_torch(x, q, scales, block) -> None:
    chunk = min(chunk_rows(x), x.shape[0]) if x.numel() else 1
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


def dequantize_rows(q, scales, out, block):
    """`out[rows, dim] = q * scales`, through Triton or torch; returns `out`."""
    if runs_triton("dequantize_taps", out):
        from hf_qst_kernels.ops import quantize_taps_triton

        quantize_taps_triton.dequantize_rows(q, scales, out, block)
        return out
    direct = out.dtype == torch.float32
    chunk = q.shape[0] if direct else min(chunk_rows(q), q.shape[0])
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


def empty_quantized(x, block):
    """Memory for `q` and `scales` of `x [..., dim]`."""
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty((*x.shape[:-1], -(-x.shape[-1] // block)), dtype=torch.float32, device=x.device)
    return q, scales


def chunk_rows(rows) -> int:
    """Rows of `[rows, dim]` whose float32 copy fills `CHUNK_BYTES`."""
    return max(1, CHUNK_BYTES.get(rows.device.type, CHUNK_BYTES["cuda"]) // (4 * rows.shape[1]))


def _blocks(tensor, scales, block):
    """`tensor` seen as `[rows, blocks, width]` with its scales `[rows, blocks, 1]`: the whole blocks, then the rest."""
    whole = tensor.shape[1] // block
    if whole:
        yield tensor[:, : whole * block].unflatten(1, (whole, block)), scales[:, :whole].unsqueeze(2)
    if whole * block < tensor.shape[1]:
        yield tensor[:, whole * block :].unsqueeze(1), scales[:, whole:].unsqueeze(2)
