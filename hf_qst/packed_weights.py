"""Keeps a 4-bit base's bytes as they are while its state dict is collected.

On processors with AVX512-BF16, bitsandbytes repacks the weights of a `Linear4bit` at its first forward in eval mode, and
`state_dict()` packs them back in place. The way back re-quantises the block scales and is not exact, so that every
`state_dict()`, hence every saved checkpoint, would change the base a little (bitsandbytes 0.50).
"""

from __future__ import annotations

import copy

from torch import nn


def keep_packed_weights(stack: nn.Module) -> list:
    """Make `state_dict()` leave the 4-bit layers of `stack` as they were; returns the handles that undo it."""
    layers = [module for module in stack.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    return [
        handle
        for layer in layers
        for handle in (layer.register_state_dict_pre_hook(_set_aside), layer.register_state_dict_post_hook(_put_back))
    ]


def _set_aside(layer, prefix, keep_vars) -> None:
    quant_state = getattr(layer.weight, "quant_state", None)
    if getattr(quant_state, "packing_format_for_cpu", False):
        layer._packed = layer.weight.data, quant_state
        # bitsandbytes converts the state in place, but not the tensors it holds.
        layer.weight.quant_state = copy.copy(quant_state)


def _put_back(layer, state_dict, prefix, local_metadata) -> None:
    packed = layer.__dict__.pop("_packed", None)
    if packed is not None:
        layer.weight.data, layer.weight.quant_state = packed
