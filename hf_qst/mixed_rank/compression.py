"""Compression of a model by one call, with PEFT's tuner around it or without."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_qst.base_model.disk_weights import DiskWeights
from hf_qst.base_model.experts import own_memory, split_named
from hf_qst.base_model.linear_layers import dense_shape
from hf_qst.base_model.offloading import require_weights
from hf_qst.base_model.packed_weights import drop_quantizer, find_packed, unpacked
from hf_qst.base_model.quantized_layers import attach_quantizer, find_quantizer
from hf_qst.mixed_rank.calibration_set import CalibrationSet
from hf_qst.mixed_rank.layer import LowRankLinear
from hf_qst.mixed_rank.pipeline import Compression, Pipeline
from hf_qst.mixed_rank.quantization import require_available
from hf_qst.mixed_rank.target_weights import TargetWeights
from hf_qst.mixed_rank.targets import experts_split, find_targets, require_reach
from hf_qst.reshaped_models import reshape_model


@torch.no_grad()
def compress(model: nn.Module, config, calibration_data: Iterable[Mapping] | None = None) -> Compression:
    """Factors for the layers of a model that `config` names; the model itself is not changed.

    Args:
        model: a transformers model with its head, or any module whose layers are named in `config.target_modules`.
        config ([`MixedRankConfig`])
        calibration_data (iterable of mappings, *optional*): instead of `config.calibration_data`.

    Raises:
        UnsupportedArchitectureError, CalibrationError, BudgetError, MissingWeightsError, ValueError: naming what does not
            fit.
    """
    data = config.calibration_data if calibration_data is None else calibration_data
    require_weights(model, "MixedRankConfig", "hf_qst.mixed_rank.compress_folder compresses its folder block by block")
    if config.residual and config.residual.reference_model is not None:
        require_weights(config.residual.reference_model, "MixedRankConfig.residual.reference_model")
    with unpacked(model), experts_split(model, config):
        return run_pipeline(model, config, data)


def run_pipeline(
    model: nn.Module, config, data: Iterable[Mapping] | None, on_disk: DiskWeights | None = None
) -> Compression:
    """Factors for a model whose weights are in memory, or `on_disk`. Args and errors as of `compress`."""
    names = find_targets(model, config)
    require_reach(model, names, config)
    require_available(config.quantize_factors, model, config.mode)
    narrowest = min(min(dense_shape(model.get_submodule(name))) for name in names)
    settings = config.resolved(data is not None, narrowest)
    calibration = None if data is None else CalibrationSet.read(data, settings, model)
    _require_backward(model, settings)
    return Pipeline(TargetWeights(model, names, settings, on_disk), settings, calibration).run()


def _require_backward(model: nn.Module, settings) -> None:
    fisher = settings.allocation.layer_weight == "fisher"
    if settings.residual or not (fisher or settings.compensation.method == "kd"):
        return
    wanted_by = "allocation.layer_weight='fisher'" if fisher else "compensation='kd'"
    packed = find_packed(model)
    if packed is not None:
        raise ValueError(
            f"MixedRankConfig.{wanted_by} needs a backward pass, which {packed!r} has lost: bitsandbytes packed it at its "
            "first forward in evaluation mode. Load the model again and compress it before it runs"
        )


def compress_model(model: nn.Module, config, calibration_data: Iterable[Mapping] | None = None) -> nn.Module:
    """Compress a model in place, without PEFT: its targets become `LowRankLinear` layers.

    A transformers model is then ready for `save_pretrained`. Args and errors as of `compress`; after an error the model
    is as before. Residuals need `get_peft_model`.
    """
    if config.residual:
        raise ValueError("compress_model replaces layers; use get_peft_model for MixedRankConfig.residual")
    if config.keep_base_weights:
        raise ValueError(
            "compress_model replaces layers; use get_peft_model for MixedRankConfig.keep_base_weights=True"
        )
    factors = compress(model, config, calibration_data).factors
    split_named(model, factors)
    for name, layer in factors.items():
        trainable = model.get_submodule(name).weight.requires_grad
        model.set_submodule(name, layer.requires_grad_(trainable))
    own_memory(model)
    return finished(model)


def finished(model: nn.Module) -> nn.Module:
    """A compressed model that saves and loads with its new shapes, if it is one of transformers."""
    changed = any(isinstance(module, LowRankLinear) for module in model.modules())
    if not changed or not isinstance(model, PreTrainedModel):
        return model
    quantizer = find_quantizer(model)
    if quantizer is None:
        drop_quantizer(model)
        return reshape_model(model)
    # Reshaping compares shapes unless it knows of a quantizer, and gives the model a configuration of its own.
    model.hf_quantizer = quantizer
    model = reshape_model(model)
    attach_quantizer(model, quantizer)
    return model
