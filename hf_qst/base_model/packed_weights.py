"""4-bit weights as the kernels read them, and what to do about bitsandbytes' packed layout of them.

On processors with AVX512-BF16, bitsandbytes repacks the weights of a `Linear4bit` at its first forward in eval mode, and
`state_dict()` packs them back in place. The way back re-quantises the block scales and is not exact, so that every
`state_dict()`, hence every saved checkpoint, would change the base a little (bitsandbytes 0.50).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from hf_qst_kernels import NF4Weight


def nf4_weight(layer: nn.Module) -> NF4Weight | None:
    """
    The weights [out_features, in_features] of a bitsandbytes `Linear4bit`, without a copy; None for what the kernels do
    not read: another layer or type, other blocks than 64 (256 for the scales), storage other than bytes, the packed
    layout, or a weight that is not quantised yet.
    """
    state = getattr(getattr(layer, "weight", None), "quant_state", None)
    # PEFT's adapters on such a layer have its name, but are no `nn.Linear`
    if not _is_linear4bit(layer) or state is None or getattr(state, "packing_format_for_cpu", False):
        return None
    readable = state.quant_type == "nf4" and state.blocksize == 64 and layer.weight.dtype == torch.uint8
    if not readable or tuple(state.shape) != (layer.out_features, layer.in_features) or layer.in_features % 64:
        return None
    if not state.nested:
        return NF4Weight(layer.weight.data, state.absmax, layer.out_features)
    if state.state2.blocksize != 256:
        return None
    return NF4Weight(
        layer.weight.data, state.absmax, layer.out_features, state.state2.absmax, state.state2.code, state.offset
    )


def _is_linear4bit(module: nn.Module) -> bool:
    """Whether `module` is bitsandbytes' 4-bit layer; that library is not imported for it."""
    return isinstance(module, nn.Linear) and type(module).__name__ in ("Linear4bit", "LinearNF4")


def forbid_packing(model: nn.Module) -> AllowPacking:
    """Keep bitsandbytes from the packed layout and its bfloat16 kernel, which has no backward.

    Once packed, a layer stays so, whatever its compute type: a LoRA inside the base that trains on after an evaluation gets
    no gradient through the layers above it. Without the packed kernel the product is bitsandbytes' float32 one, exact and
    several times slower on such processors.

    Returns:
        A handle whose `remove()` takes this back.
    """
    layers = [layer for layer in _four_bit_layers(model) if layer.support_avx512bf16_for_cpu]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return AllowPacking(layers)


class AllowPacking:
    """Undoes `forbid_packing` for the layers that it changed."""

    def __init__(self, layers: list[nn.Module]):
        self.layers = layers

    def remove(self) -> None:
        for layer in self.layers:
            layer.support_avx512bf16_for_cpu = True


def forbid_packing_where_it_fails(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights its packed layout has no room for, or that FSDP will divide.

    It does so at the first forward in eval mode, and fails unless the output width is a multiple of 32 and the input width
    one of the block size (bitsandbytes 0.50). A weight that is stored as floating point is meant for FSDP, which brings the
    unpacked one back at the next forward, where it would be read as packed.
    """
    for layer in _four_bit_layers(model):
        blocksize = getattr(layer.weight, "blocksize", 1)  # a layer that was left out of the quantisation has none
        if layer.out_features % 32 or layer.in_features % blocksize or layer.weight.is_floating_point():
            forbid_packing(layer)


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Keep bitsandbytes from packing 4-bit weights meanwhile: there is no exact way back from that layout."""
    forbidden = forbid_packing(model)
    try:
        yield
    finally:
        forbidden.remove()


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


def drop_quantizer(model: nn.Module) -> None:
    """Tell a transformers model that its weights are in floating point, if it says that they are quantised.

    They are where layers were replaced, and from the start in a model loaded from a GGUF file. transformers refuses to save
    what it takes for a quantised model of such a kind.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
