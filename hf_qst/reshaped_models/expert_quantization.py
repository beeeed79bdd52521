"""Experts of a mixture in 4 bits, which transformers and bitsandbytes leave in floating point."""

from __future__ import annotations

from transformers import PreTrainedModel

from hf_qst.base_model.experts import SplitExperts, fused_experts, own_memory, split
from hf_qst.base_model.offloading import require_weights
from hf_qst.base_model.quantized_layers import attach_quantizer, find_quantizer, put_experts_in_nf4
from hf_qst.extras import require
from hf_qst.reshaped_models.classes import reshape_model


def split_experts(model: PreTrainedModel) -> PreTrainedModel:
    """Make every expert's matrices linear layers, in place; the function stays the same.

    What quantises, factorises or adapts linear layers then knows the experts: a folder that is saved of the result loads
    with `quantization_config=` with the experts in 4 bits.

    Args:
        model ([`~transformers.PreTrainedModel`]): with experts in transformers' common form.

    Raises:
        ValueError: there are no such experts.
    """
    split(model, _paths(model))
    own_memory(model)
    return reshape_model(model)


def _paths(model: PreTrainedModel) -> list[str]:
    paths = list(fused_experts(model))
    if not paths and not any(isinstance(module, SplitExperts) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has no experts of transformers' common form (gate_up_proj, down_proj)"
        )
    return paths


def quantize_experts(model: PreTrainedModel) -> PreTrainedModel:
    """Hold every expert of a mixture in NF4 (blocks of 64 values, scales in 8 bits), in place.

    An expert is dequantised when it runs, for the tokens that were routed to it. Attention, shared experts and the rest
    stay as they are: in 4 bits, where the model was loaded so. The model saves and reloads as any that transformers loaded
    in 4 bits.

    Args:
        model ([`~transformers.PreTrainedModel`]): in floating point, or loaded with `load_in_4bit=True` in NF4.

    Raises:
        ImportError: bitsandbytes is missing.
        ValueError: the model has no such experts, or its other layers are quantised in another way.
        MissingWeightsError: weights are offloaded.
    """
    require("bitsandbytes", "quantize_experts")
    settings = getattr(model.config, "quantization_config", None)
    double = getattr(settings, "bnb_4bit_use_double_quant", True)
    if settings is not None and getattr(settings, "bnb_4bit_quant_type", None) != "nf4":
        raise ValueError(
            "quantize_experts takes a model in floating point or one loaded with bnb_4bit_quant_type='nf4'; this one is "
            f"quantised by {getattr(settings, 'quant_method', settings)}"
        )
    require_weights(model, "quantize_experts")
    split(model, _paths(model))
    put_experts_in_nf4(model, double)
    quantizer = find_quantizer(model)
    model.hf_quantizer = quantizer
    model = reshape_model(model)
    attach_quantizer(model, quantizer)
    return model
