"""Folders whose weights are quantised by bitsandbytes: loaded with another head than the one saved, and saved again."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

_SKIPPED = "llm_int8_skip_modules"


def leave_new_heads_unquantised(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, tensors: set[str]
) -> None:
    """Name the layers of a new head among those that are not quantised, in place of `config.quantization_config`.

    transformers makes quantised layers of all that the saved settings do not name, and has no values for those that are
    not in the files.

    Args:
        model_class: what is loaded.
        config: the folder's; not quantised by bitsandbytes, it stays as it is.
        tensors: names of the tensors in the files.
    """
    settings = getattr(config, "quantization_config", None)
    values = settings if isinstance(settings, dict) else getattr(settings, "__dict__", {})
    if values.get("quant_method") != "bitsandbytes":
        return
    with torch.device("meta"):
        twin = model_class(copy.deepcopy(config))
    inside = set(twin.base_model.modules())
    new = [
        name
        for name, module in twin.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module not in inside and f"{name}.weight" not in tensors
    ]
    if not new:
        return
    skipped = values.get(_SKIPPED)
    skipped = get_keys_to_not_convert(twin) if skipped is None else skipped
    names = sorted({*skipped, *new})
    settings = copy.copy(settings)
    if isinstance(settings, dict):
        settings[_SKIPPED] = names
    else:
        setattr(settings, _SKIPPED, names)
    config.quantization_config = settings


def save_as_loaded(model: PreTrainedModel) -> None:
    """Let a model with 4-bit weights from a 4-bit folder be saved again.

    transformers tries to undo on saving what joined the weights with their scales on loading, and cannot; the layers save
    both by themselves.
    """
    conversions = getattr(model, "_weight_conversions", None) or ()
    quantizer = getattr(model, "hf_quantizer", None)
    of_quantizer = {
        type(operation)
        for conversion in (quantizer.get_weight_conversions() if quantizer is not None else ())
        for operation in getattr(conversion, "operations", ())
    }
    if of_quantizer:
        model._weight_conversions = [
            conversion
            for conversion in conversions
            if not of_quantizer & {type(operation) for operation in getattr(conversion, "operations", ())}
        ]
