"""What to do about bitsandbytes' packed layout of 4-bit weights.

On processors with AVX512-BF16, bitsandbytes repacks the weights of a `Linear4bit` at its first forward in eval mode, and
`state_dict()` packs them back in place. The way back re-quantises the block scales and is not exact, so that every
`state_dict()`, hence every saved checkpoint, would change the base a little (bitsandbytes 0.50).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def forbid_packing(model: nn.Module) -> None:
    """Keep bitsandbytes from the packed layout and its bfloat16 kernel, which has no backward.

    Once packed, a layer stays so, whatever its compute type: a LoRA inside the base that trains on after an evaluation gets
    no gradient through the layers above it. Without the packed kernel the product is bitsandbytes' float32 one, exact and
    several times slower on such processors.
    """
    for layer in _four_bit_layers(model):
        layer.support_avx512bf16_for_cpu = False


def forbid_packing_of_odd_shapes(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights its packed layout has no room for.

    It does so at the first forward in eval mode, and fails unless the output width is a multiple of 32 and the input width
    one of the block size (bitsandbytes 0.50).
    """
    for layer in _four_bit_layers(model):
        if layer.out_features % 32 or layer.in_features % layer.weight.blocksize:
            forbid_packing(layer)


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Keep bitsandbytes from packing 4-bit weights meanwhile: there is no exact way back from that layout."""
    layers = [layer for layer in _four_bit_layers(model) if layer.support_avx512bf16_for_cpu]
    forbid_packing(model)
    try:
        yield
    finally:
        for layer in layers:
            layer.support_avx512bf16_for_cpu = True


def find_packed(model: nn.Module) -> str | None:
    """Name of a 4-bit layer that is in the packed layout, through which nothing is back-propagated; None without any."""
    for name, module in model.named_modules():
        if getattr(getattr(getattr(module, "weight", None), "quant_state", None), "packing_format_for_cpu", False):
            return name
    return None


def _four_bit_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]


def keep_packed_weights(stack: nn.Module) -> list:
    """Make `state_dict()` leave the 4-bit layers of `stack` as they were; returns the handles that undo it."""
    return [
        handle
        for layer in _four_bit_layers(stack)
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
