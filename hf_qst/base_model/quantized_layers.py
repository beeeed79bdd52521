"""Linear layers in 4 or 8 bits, as bitsandbytes holds them, made of layers that are in floating point.

What is made here is what transformers makes when it loads a model with `quantization_config=`: it saves, reloads and
takes LoRA in the same ways.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer, HfQuantizer

from hf_qst.base_model.experts import SplitExperts
from hf_qst.base_model.linear_layers import dense_weight, float_dtype

# Outlier columns of the inputs are multiplied in 16 bits, as with transformers' own 8-bit loading.
_OUTLIER_THRESHOLD = 6.0


def scheme_of(module: nn.Module) -> str | None:
    """How a linear layer's weight is held: `"nf4"`, `"fp4"`, `"int8"`, or None for floating point."""
    weight = getattr(module, "weight", None)
    return {"Params4bit": getattr(weight, "quant_type", None), "Int8Params": "int8"}.get(type(weight).__name__)


def quantized(part: nn.Linear, scheme: str, double: bool = True) -> nn.Linear:
    """A layer with the weights of `part` in NF4 (blocks of 64 values, scales in 8 bits with `double`) or in int8.

    Raises:
        ValueError: values out of the range of float16, in which bitsandbytes takes 8-bit scales.
    """
    from bitsandbytes import nn as bnb

    if scheme == "int8" and part.in_features == 1:
        # A row of one value is smaller than its scale, and torch's int8 product over one column is wrong on a CPU.
        return part
    sizes = part.in_features, part.out_features, part.bias is not None
    weight, device = part.weight.detach(), part.weight.device
    if scheme == "int8" and weight.abs().max() > torch.finfo(torch.float16).max:
        raise ValueError(f"a weight of {list(weight.shape)} holds values above 65504 and cannot be quantised to int8")
    with torch.device("meta"):
        if scheme == "nf4":
            made = bnb.Linear4bit(*sizes, compute_dtype=weight.dtype, compress_statistics=double, quant_type="nf4")
        else:
            made = bnb.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=_OUTLIER_THRESHOLD)
    if scheme == "nf4":
        made.weight = bnb.Params4bit(weight, compress_statistics=double, quant_type="nf4", module=made).to(device)
    else:
        # bitsandbytes quantises on the way from the CPU.
        made.weight = bnb.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(device)
    if part.bias is not None:
        made.bias = part.bias
    made.register_load_state_dict_pre_hook(_take_quantized)
    return made.train(part.training)


def put_experts_in_nf4(model: nn.Module, double: bool) -> None:
    """Quantise the plain layers of all split experts, in place; on the meta device to layers without weights."""
    for experts in model.modules():
        if isinstance(experts, SplitExperts):
            for index in range(len(experts)):
                for name, layer in list(experts[index].named_children()):
                    if type(layer) is nn.Linear:
                        setattr(experts[index], name, quantized(layer, "nf4", double))


def dequantized(part: nn.Linear) -> nn.Linear:
    """A layer in floating point with the values that `part` has now."""
    with torch.device("meta"):
        made = nn.Linear(part.in_features, part.out_features, bias=part.bias is not None)
    made.weight = nn.Parameter(dense_weight(part).T.to(float_dtype(part)).contiguous())
    if part.bias is not None:
        made.bias = part.bias
    return made.train(part.training)


def _take_quantized(module, state_dict, prefix, *args) -> None:
    """Load a quantised weight with its scales, which bitsandbytes' layers by themselves save but do not load."""
    from bitsandbytes import nn as bnb

    own = f"{prefix}weight"
    if own not in state_dict:
        return
    data, device = state_dict[own], module.weight.device
    if f"{prefix}SCB" in state_dict:
        scales = state_dict.pop(f"{prefix}SCB").to(device)
        data = data.to(device)
        module.weight = bnb.Int8Params(data, requires_grad=False, has_fp16_weights=False, CB=data, SCB=scales)
        module.state.reset_grads()
    elif any(key.startswith(f"{own}.") for key in state_dict):
        state = {k.removeprefix(f"{own}."): state_dict.pop(k) for k in list(state_dict) if k.startswith(f"{own}.")}
        module.weight = bnb.Params4bit.from_prequantized(data, state, device=device, module=module)
    # What follows copies the weight onto itself.
    state_dict[own] = module.weight.data


def find_quantizer(model: PreTrainedModel) -> HfQuantizer | None:
    """What transformers attaches to a model that it loaded with quantised layers like this one's; None without any.

    Its settings name the layers that are not quantised, so that the saved folder reloads as it is.
    """
    quantised = {scheme_of(module): module for module in model.modules() if scheme_of(module)}
    if not quantised:
        return None
    settings = getattr(model.config, "quantization_config", None)
    settings = _settings(*quantised.popitem()) if settings is None else copy.copy(settings)
    # Without the backbone's prefix the names also hold for the backbone loaded alone.
    prefix = f"{model.base_model_prefix}."
    settings.llm_int8_skip_modules = [
        name.removeprefix(prefix) for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)
    ]
    return AutoHfQuantizer.from_config(settings, pre_quantized=True)


def attach_quantizer(model: PreTrainedModel, quantizer: HfQuantizer) -> None:
    """Make a model one that transformers loaded with this quantizer: it saves, reloads and takes LoRA."""
    model.is_quantized, model.quantization_method = True, quantizer.quantization_config.quant_method
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)


def _settings(scheme: str, module: nn.Module) -> BitsAndBytesConfig:
    if scheme == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=_OUTLIER_THRESHOLD)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=scheme,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=module.compute_dtype,
    )


def stored_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters, and of the scales and tables of those that are quantised."""
    total = 0
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            total += parameter.numel() * parameter.element_size()
            quant_state = getattr(parameter, "quant_state", None)
            if quant_state is not None:
                total += sum(t.numel() * t.element_size() for t in quant_state.as_dict(packed=True).values())
        if scheme_of(part) == "int8":
            scales = part.state.SCB if part.weight.SCB is None else part.weight.SCB
            total += scales.numel() * scales.element_size()
    return total
