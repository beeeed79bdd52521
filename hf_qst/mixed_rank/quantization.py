"""Factors in 4 or 8 bits: the two linear layers of a low-rank one, as bitsandbytes holds them.

Quantised factors do not train; their bias does.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from hf_qst.base_model.packed_weights import forbid_packing
from hf_qst.base_model.quantized_layers import dequantized, quantized, scheme_of
from hf_qst.extras import require
from hf_qst.mixed_rank.layer import LowRankLinear

SCHEMES = ("nf4", "int8")


def require_available(scheme: str | None, model: nn.Module, mode: str = "replace") -> None:
    """Check that factors of a model can be quantised.

    Raises:
        ImportError: bitsandbytes is missing.
        ValueError: the model, whose layers they replace, is quantised in another way: one saved model has one way.
    """
    if scheme is None:
        return
    require("bitsandbytes", f"MixedRankConfig.quantize_factors={scheme!r}")
    for name, module in model.named_modules():
        held = scheme_of(module) if mode == "replace" else None
        if held not in (None, scheme):
            raise ValueError(
                f"MixedRankConfig.quantize_factors={scheme!r} does not go with {name!r}, which is in {held}: a model "
                f"has one quantisation. Use quantize_factors={held!r} or None"
                if held in SCHEMES
                else f"MixedRankConfig.quantize_factors must be None for a model in {held}, got {scheme!r}"
            )


def quantize_factors(layer: LowRankLinear, scheme: str) -> LowRankLinear:
    """Hold both factors in NF4 (blocks of 64 values, scales in 8 bits) or in int8 (a scale for each row); in place.

    Args:
        layer: with floating-point factors.
        scheme (`str`): `"nf4"` or `"int8"`.

    Raises:
        ValueError: a factor is out of the range of float16, in which bitsandbytes takes 8-bit scales.
    """
    layer.down, layer.up = (quantized(part, scheme) for part in (layer.down, layer.up))
    forbid_packing(layer)
    return layer


def dequantize_factors(layer: LowRankLinear) -> LowRankLinear:
    """Hold both factors in floating point again, with the values they have now; in place."""
    layer.down, layer.up = (dequantized(part) for part in (layer.down, layer.up))
    return layer


def saved_rank(key: str, state_dict: Mapping[str, torch.Tensor]) -> int:
    """Rank of the factor `down.weight` that is saved under `key`; 4-bit weights keep their shape among their scales."""
    packed = state_dict.get(f"{key}.quant_state.bitsandbytes__nf4")
    if packed is None:
        return state_dict[key].shape[0]
    from bitsandbytes.utils import unpack_tensor_to_dict

    return unpack_tensor_to_dict(packed)["shape"][0]
