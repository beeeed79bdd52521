"""Models made from a configuration alone, on the meta device, and what their parts count and weigh."""

from __future__ import annotations

import json
import os
from collections import Counter

import torch
from peft import get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.quantizers import AutoHfQuantizer

from hf_qst.base_model.decoder_stack import UnsupportedArchitectureError, find_decoder_stack, text_config
from hf_qst.base_model.experts import fused_experts, split
from hf_qst.base_model.linear_layers import dense_shape, is_linear
from hf_qst.base_model.quantized_layers import put_experts_in_nf4

_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8", torch.int8: "I8"}


def config_of(model_or_config) -> PretrainedConfig:
    """The configuration of a model; a folder or a hub name is read without its weights."""
    if isinstance(model_or_config, (str, os.PathLike)):
        return AutoConfig.from_pretrained(model_or_config)
    return model_or_config if isinstance(model_or_config, PretrainedConfig) else model_or_config.config


def empty_model(
    config: PretrainedConfig, dtype: torch.dtype, quantization_config=None, task_type=None, experts: bool = False
) -> nn.Module:
    """The model of a configuration on the meta device.

    Args:
        config: its own `quantization_config` holds where none is given.
        dtype: of what is not quantised.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*): how linear layers are loaded.
        task_type (`str`, *optional*): PEFT's; `"SEQ_CLS"` makes a classifier.
        experts (`bool`): whether the experts of a mixture are in 4 bits too.

    Raises:
        ValueError: transformers has no model with a head for this configuration.
    """
    quantization = quantization_config or getattr(config, "quantization_config", None)
    if isinstance(quantization, dict):
        quantization = BitsAndBytesConfig.from_dict(quantization)
    autos = [AutoModelForCausalLM, AutoModelForImageTextToText]
    if str(task_type).endswith("SEQ_CLS"):
        autos = [AutoModelForSequenceClassification]
    auto = next((auto for auto in autos if type(config) in auto._model_mapping), None)
    if auto is None:
        raise ValueError(f"model_or_config: transformers has no language model for {type(config).__name__}")
    with torch.device("meta"):
        model = auto.from_config(config, dtype=dtype)
    if quantization is not None:
        quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
        quantizer.preprocess_model(model, dtype=dtype, device_map=None)
        quantizer.postprocess_model(model)
        model.hf_quantizer = quantizer
    if experts:
        split(model, fused_experts(model))
        put_experts_in_nf4(model, getattr(quantization, "bnb_4bit_use_double_quant", True))
    model.requires_grad_(False)
    return model


def with_head(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def vocabulary(model: nn.Module) -> int:
    return text_config(with_head(model).config).vocab_size


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that PEFT's layers and trained copies of modules added, by name."""
    inside = []
    for path, module in model.named_modules():
        for name in getattr(module, "adapter_layer_names", ()) if isinstance(module, BaseTunerLayer) else ():
            inside.append(f"{path}.{name}." if path else f"{name}.")
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.startswith(tuple(inside)) or ".modules_to_save." in name
    }


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters by part; a 4-bit weight counts with its shape before packing, a tied one once.

    Of the base: embeddings, blocks, head and others. Of an adapter: by the child of its network, or its kind of factor.
    """
    adapters = {id(p): _child(name, model) for name, p in adapter_parameters(model).items()}
    packed = {id(m.weight): dense_shape(m) for m in model.modules() if is_linear(m)}
    places = _places(with_head(model))
    found: Counter = Counter()
    for parameter in model.parameters():
        shape = packed.get(id(parameter))
        size = parameter.numel() if shape is None else shape[0] * shape[1]
        part = adapters.get(id(parameter))
        found[f"adapter: {part}" if part else places.get(id(parameter), "others")] += size
    return dict(found)


def _places(model: nn.Module) -> dict[int, str]:
    try:
        stack = find_decoder_stack(model)
    except UnsupportedArchitectureError:
        return {id(p): "base" for p in model.parameters()}
    head = model.get_output_embeddings()
    parts = {"head": head, "blocks": stack.blocks, "embeddings": stack.embeddings}
    return {id(p): name for name, part in parts.items() if part is not None for p in part.parameters()}


def _child(name: str, model: nn.Module) -> str:
    """`...qst_net.default.blocks.0...` -> `blocks`, `...lora_A.default.weight` -> `lora_A`."""
    adapters = set(getattr(model, "peft_config", {}))
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part in adapters), None)
    if at is None:
        return "trained modules"
    after = parts[at + 1] if at + 1 < len(parts) else ""
    return parts[at - 1] if after in ("weight", "bias", "") else after


def weight_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes by kind of storage; a tensor that is used twice counts once.

    `"4-bit weights"`, `"4-bit scales"`, `"weights"` and `"buffers"` of the base, and `"adapter"`.
    """
    adapters = {id(p) for p in adapter_parameters(model).values()}
    found: Counter = Counter()
    tables = set()
    for parameter in model.parameters():
        state, size = getattr(parameter, "quant_state", None), parameter.numel() * parameter.element_size()
        if state is not None:
            found["4-bit weights"] += size
            second = (state.state2.absmax, state.offset) if state.nested else ()
            found["4-bit scales"] += sum(t.numel() * t.element_size() for t in (state.absmax, *second))
            codes = (state.code, state.state2.code) if state.nested else (state.code,)
            tables |= {(t.untyped_storage()._cdata, t.numel() * t.element_size()) for t in codes}
        else:
            found["adapter" if id(parameter) in adapters else "weights"] += size
    found["4-bit scales"] += sum(size for _, size in tables)
    found["buffers"] = sum(b.numel() * b.element_size() for b in {id(b): b for b in model.buffers()}.values())
    return {kind: size for kind, size in found.items() if size}


def adapter_file_bytes(model: nn.Module) -> int:
    """Size of `adapter_model.safetensors` as `save_pretrained` will write it, header included."""
    tensors = _saved_tensors(model)
    # safetensors lays tensors out by alignment, then by name.
    order = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header, start = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in order:
        end = start + tensor.numel() * tensor.element_size()
        entry = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        header[name], start = entry, end
    size = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-size // 8) * 8 + start


def _saved_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    # Not `state_dict()`: bitsandbytes' layers read their scales for it.
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    name = next(iter(model.peft_config))
    return get_peft_model_state_dict(model, tensors, adapter_name=name, save_embedding_layers=False)
