"""NF4 weights as bitsandbytes stores them, and how they are dequantised.

Two weights share a byte, the one of the even input in its high half; blocks of 64 share a scale `a`:

    W_k = code[n_k] a_{k // 64}

Dettmers et al., arXiv 2305.14314, section 3. With double quantisation the scales are bytes too, `q`, in blocks of 256:
`a_j = nested_code[q_j] c_{j // 256} + offset`.
"""

from typing import NamedTuple

import torch

from .arguments import check_shape

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


class NF4Weight(NamedTuple):
    """
    Frozen weights `W [out_features, in_features]` as bitsandbytes stores them.

    Of a bitsandbytes `Params4bit` with `quant_state`: `packed` is its data, `absmax` is `quant_state.absmax`, and with
    double quantisation `nested_absmax`, `nested_code` and `nested_offset` are `quant_state.state2.absmax`,
    `quant_state.state2.code` and `quant_state.offset`.

    Args:
        packed (`torch.Tensor`): uint8, `in_features * out_features / 2` entries, row by row.
        absmax (`torch.Tensor`): `[in_features * out_features / 64]`, float32, or uint8 with double quantisation.
        out_features (`int`): rows of `W`; `in_features` must be a multiple of 64.
        nested_absmax (`torch.Tensor`, *optional*): `[ceil(len(absmax) / 256)]`, float32.
        nested_code (`torch.Tensor`, *optional*): `[256]`, float32.
        nested_offset (`torch.Tensor`, *optional*): one number, float32.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    out_features: int
    nested_absmax: torch.Tensor | None = None
    nested_code: torch.Tensor | None = None
    nested_offset: torch.Tensor | None = None

    @property
    def in_features(self) -> int:
        return 2 * self.packed.numel() // self.out_features


def check_weight(weight: NF4Weight, in_features: int) -> None:
    """
    Raise unless the tensors of `weight` fit each other and `in_features`, itself a multiple of 64.

    Raises:
        TypeError: a dtype other than those of [`NF4Weight`].
        ValueError: sizes that do not fit, or some of the nested tensors without the others.
    """
    packed, absmax, out_features, *nested = weight
    nested_absmax, nested_code, nested_offset = nested
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed must be uint8, got {packed.dtype}")
    weights = in_features * out_features
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


def check_blocks(name: str, x: torch.Tensor) -> None:
    """Raise `ValueError` unless the last axis of `x` is a multiple of 64, the block that shares a scale."""
    if x.dim() < 1 or x.shape[-1] < 1 or x.shape[-1] % BLOCK:
        raise ValueError(
            f"{name} must be [..., in_features] with in_features a multiple of {BLOCK}, got {list(x.shape)}"
        )


def naive_weight(weight: NF4Weight, dtype: torch.dtype) -> torch.Tensor:
    """`W` by the equation at the top of this file, all of it in `dtype`."""
    code = torch.tensor(CODE, dtype=dtype, device=weight.packed.device)
    pairs = weight.packed.reshape(-1)
    values = code[torch.stack([pairs >> 4, pairs & 15], -1).int()].view(-1, BLOCK)
    return (values * _scales(weight, dtype)[:, None]).view(weight.out_features, -1)


def library_weight(weight: NF4Weight, dtype: torch.dtype) -> torch.Tensor:
    """`W` in `dtype`, by bitsandbytes' kernel where that library is loaded (who has its weights has loaded it)."""
    compute = torch.promote_types(dtype, torch.float32)
    if not hasattr(torch.ops.bitsandbytes, "dequantize_4bit") or dtype == torch.float64:
        return naive_weight(weight, compute).to(dtype)
    shape = [weight.out_features, weight.in_features]
    scales = _scales(weight, compute)
    return torch.ops.bitsandbytes.dequantize_4bit(weight.packed.view(-1, 1), scales, BLOCK, "nf4", shape, dtype)


def with_plain_scales(weight: NF4Weight, dtype: torch.dtype) -> NF4Weight:
    """The same weights without double quantisation, their scales in `dtype`: of these, some rows are weights again."""
    return NF4Weight(weight.packed.reshape(-1), _scales(weight, dtype), weight.out_features)


def some_rows(weight: NF4Weight, rows: slice) -> NF4Weight:
    """Views of rows `start` to `stop` of `W`, which must exist; `weight` has plain scales."""
    count, inputs = rows.stop - rows.start, weight.in_features
    packed = weight.packed.narrow(0, rows.start * inputs // 2, count * inputs // 2)
    return NF4Weight(packed, weight.absmax.narrow(0, rows.start * inputs // BLOCK, count * inputs // BLOCK), count)


def _scales(weight: NF4Weight, dtype: torch.dtype) -> torch.Tensor:
    if weight.nested_absmax is None:
        return weight.absmax.to(dtype)
    outer = weight.nested_absmax.to(dtype).repeat_interleave(NESTED_BLOCK)[: weight.absmax.numel()]
    scales = weight.nested_code.to(dtype)[weight.absmax.int()]
    return scales.mul_(outer).add_(weight.nested_offset.to(dtype))  # in place: of a large head these are megabytes
