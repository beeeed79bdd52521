"""What a compressed model consists of."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_qst.base_model.linear_layers import dense_shape, is_linear
from hf_qst.base_model.quantized_layers import stored_bytes
from hf_qst.mixed_rank.layer import LowRankLinear


def rank_report(model: nn.Module) -> list[dict[str, Any]]:
    """Name, shape [d_in, d_out], rank, rank as a part of the break-even rank, parameters and bytes of every linear
    layer.

    The rank of a dense layer is None. Factors count for the layer they belong to, quantised weights with their number of
    values; bytes include the scales.
    """
    rows, inside = [], ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        low_rank = isinstance(module, LowRankLinear)
        if not low_rank and not is_linear(module):
            continue
        shape = (module.in_features, module.out_features) if low_rank else dense_shape(module)
        if low_rank:
            inside = (*inside, f"{name}.")
        rows.append(
            {
                "name": name,
                "shape": list(shape),
                "rank": module.rank if low_rank else None,
                "break_even_part": module.rank * sum(shape) / (shape[0] * shape[1]) if low_rank else None,
                "parameters": _count(module, module.rank * sum(shape) if low_rank else shape[0] * shape[1]),
                "bytes": stored_bytes(module),
            }
        )
    return rows


def _count(module: nn.Module, weights: int) -> int:
    return weights if module.bias is None else weights + module.bias.numel()
