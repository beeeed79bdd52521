"""4-bit weights as the kernels read them, and what to do about bitsandbytes' packed layout of them.

On processors with AVX512-BF16, bitsandbytes (0.50) repacks the weights of a `Linear4bit` at its first forward in eval mode,
for a kernel in bfloat16:

- the kernel has no backward pass: a layer below gets no gradient, and nothing says so;
- it fails for input widths that are no multiple of the block size and output widths that are no multiple of 32;
- `state_dict()` packs back in place. Scales in 8 bits are quantised anew, and those in float32 stay in bfloat16 and in the
  order of the packed layout, so that what is saved computes something else.

So nothing of ours that gradients flow through, or that is saved, is packed (`forbid_packing`). Only QST's frozen base may
be; it is kept as it was loaded (`keep_packed_weights`).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import nn

from hf_qst_kernels import NF4Weight

logger = logging.getLogger(__name__)


def nf4_weight(layer: nn.Module) -> NF4Weight | None:
    """
    The weights [out_features, in_features] of a bitsandbytes `Linear4bit`, without a copy; None for what the kernels do
    not read: another layer or type, other blocks than 64 (256 for the scales), storage other than bytes, the packed
    layout, or a weight that is not quantised yet.
    """
    state = getattr(getattr(layer, "weight", None), "quant_state", None)
    # PEFT's adapters on such a layer have its name, but are no `nn.Linear`
    if not _is_linear4bit(layer) or state is None or is_packed(layer):
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


def _has_room(layer: nn.Module) -> bool:
    """Whether the packed layout can hold a 4-bit layer; bitsandbytes fails for others.

    Nor may a weight be packed that is stored as floating point: it is meant for FSDP, which brings the unpacked one back at
    the next forward, where it would be read as packed.
    """
    if getattr(layer.weight, "quant_state", None) is not None and layer.weight.is_floating_point():
        return False
    blocksize = getattr(layer.weight, "blocksize", 1)  # a layer that was left out of the quantisation has none
    return layer.out_features % 32 == 0 and layer.in_features % blocksize == 0


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Keep bitsandbytes from packing 4-bit weights meanwhile: there is no exact way back from that layout."""
    forbidden = forbid_packing(model)
    try:
        yield
    finally:
        forbidden.remove()


def is_packed(layer: nn.Module) -> bool:
    """Whether the weight of a layer is in the packed layout."""
    return getattr(getattr(getattr(layer, "weight", None), "quant_state", None), "packing_format_for_cpu", False)


def find_packed(model: nn.Module) -> str | None:
    """Name of a 4-bit layer that is in the packed layout, through which nothing is back-propagated; None without any."""
    return next((name for name, module in model.named_modules() if is_packed(module)), None)


def unpack(model: nn.Module) -> None:
    """Give packed layers the usual layout again, through which gradients flow.

    Their scales are those of before where `keep_packed_weights` has seen them; otherwise they were rounded to bfloat16,
    and those in 8 bits are quantised anew.
    """
    for layer in _four_bit_layers(model):
        if is_packed(layer):
            layer.weight.data, layer.weight.quant_state = _usual_layout(layer)


def refuse_training_while_packed(model: nn.Module) -> None:
    """Let a forward of `model` in training fail as long as layers are packed, if any are now."""
    if find_packed(model) is not None:
        model.register_forward_pre_hook(_refuse_packed)


def _refuse_packed(model, arguments) -> None:
    if model.training and torch.is_grad_enabled() and (packed := find_packed(model)) is not None:
        raise ValueError(
            f"gradients go through the base, but bitsandbytes has packed {packed!r} for a kernel without backward, as it does "
            "at a model's first forward in evaluation mode on this processor: load the base again and wrap it before it runs, "
            "or call hf_qst.base_model.unpack(model), which rounds its scales"
        )


def _four_bit_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]


def keep_packed_weights(stack: nn.Module) -> list:
    """Let the 4-bit layers of a frozen `stack` be packed where that works, and make `state_dict()` give what was loaded.

    One warning says that they will be.

    Returns:
        Handles that undo it.
    """
    layers = [layer for layer in _four_bit_layers(stack) if layer.support_avx512bf16_for_cpu or is_packed(layer)]
    handles: list = [forbid_packing(layer) for layer in layers if not _has_room(layer)]
    layers = [layer for layer in layers if _has_room(layer)]
    if any(layer.weight.device.type == "cpu" for layer in layers):
        _say_packed()
    for layer in layers:
        handles.append(layer.register_forward_pre_hook(_remember))
        handles.append(layer.register_state_dict_pre_hook(_set_aside))
        handles.append(layer.register_state_dict_post_hook(_put_back))
    return handles


@cache
def _say_packed() -> None:
    logger.warning(
        "bitsandbytes repacks the 4-bit weights of this base for its bfloat16 kernel, as the processor has AVX512-BF16: outputs "
        "are rounded otherwise than on a processor without it. hf_qst.base_model.forbid_packing(model) before the first "
        "forward keeps the float32 product, which is slower"
    )


def _remember(layer, arguments) -> None:
    state = getattr(layer.weight, "quant_state", None)
    if layer.weight.device.type == "cpu" and state is not None and not is_packed(layer):
        # bitsandbytes converts the state in place, but not the tensors it holds.
        layer._usual_state = copy.copy(state)


def _usual_layout(layer: nn.Module):
    """Data and quantisation state of a packed layer in the usual layout."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    packed, known = layer.weight.quant_state, layer.__dict__.get("_usual_state")
    data, state = _convert_weight_packed_for_cpu_inverse(layer.weight.data, copy.copy(packed))
    if not packed.original_nested:
        state.absmax = packed.absmax.T.reshape(-1).float()
    return data, state if known is None else known


def _set_aside(layer, prefix, keep_vars) -> None:
    if is_packed(layer):
        layer._packed = layer.weight.data, layer.weight.quant_state
        layer.weight.data, layer.weight.quant_state = _usual_layout(layer)


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
