"""How one tensor of states [tokens, width] is stored: in one part, or in 8 bits with its scales."""

from __future__ import annotations

import torch

from hf_qst_kernels import dequantize_taps, quantize_taps

SCALES = ".scales"
"""Ending of the name of the part with the scales."""


def encode(name: str, state: torch.Tensor, storage: str) -> dict[str, torch.Tensor]:
    """The parts in which `state` [..., width] is stored, by their names, on the CPU; see `HiddenStateCacheConfig`."""
    if storage == "int8":
        values, scales = quantize_taps(state)
        return {name: values.cpu(), name + SCALES: scales.cpu()}
    if storage == "bfloat16" and state.dtype.itemsize > 2:
        state = state.to(torch.bfloat16)
    return {name: state.detach().cpu()}


def part_names(name: str, storage: str) -> list[str]:
    """The names of the parts of a tensor."""
    return [name, name + SCALES] if storage == "int8" else [name]


def decode(name: str, parts: dict[str, torch.Tensor], storage: str, dtype: torch.dtype | None) -> torch.Tensor:
    """The tensor [..., width] from its parts, in `dtype`; None: as it is stored, or float32."""
    if storage == "int8":
        return dequantize_taps(parts[name], parts[name + SCALES], dtype or torch.float32)
    return parts[name].to(dtype or parts[name].dtype)
