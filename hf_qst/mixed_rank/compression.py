"""The three stages one after another: from a dense model and a few batches to the factors of its layers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_qst.base_model.linear_layers import dense_shape
from hf_qst.base_model.offloading import require_weights
from hf_qst.base_model.packed_weights import find_packed, unpacked
from hf_qst.calibration import CalibrationError, as_batches, input_groups
from hf_qst.calibration.moments import CrossMoment
from hf_qst.mixed_rank.allocation import DENSE
from hf_qst.mixed_rank.budget import allocate, fixed_ranks
from hf_qst.mixed_rank.compensation import (
    GRADIENT_LEARNING_RATE,
    GRADIENT_STEPS,
    ProxyRows,
    bias_shift,
    gradient_factors,
    least_squares_factors,
)
from hf_qst.mixed_rank.decomposition import factorize, metric_matrix
from hf_qst.mixed_rank.distillation import HELD_OUT, distil, split
from hf_qst.mixed_rank.layer import LowRankLinear
from hf_qst.mixed_rank.metric_source import MetricSource, methods, warn_about_rows
from hf_qst.mixed_rank.quantization import attach_quantizer, find_quantizer, require_available
from hf_qst.mixed_rank.selection import choose_allocator
from hf_qst.mixed_rank.sensitivity import fisher_weights
from hf_qst.mixed_rank.sequential import compress_in_order
from hf_qst.mixed_rank.targets import find_blocks, find_targets
from hf_qst.mixed_rank.weights import Weights
from hf_qst.reshaped_models import reshape_model

logger = logging.getLogger(__name__)


@dataclass
class Compression:
    """The outcome: factors by layer name, the names of layers that stay dense, and what is known of each layer.

    `allocation` and `distillation` say what `allocator="auto"` and `compensation="kd"` measured on held-out batches.
    """

    factors: dict[str, LowRankLinear] = field(default_factory=dict)
    dense: list[str] = field(default_factory=list)
    statistics: dict[str, dict] = field(default_factory=dict)
    allocation: dict | None = None
    distillation: dict | None = None

    @property
    def ranks(self) -> dict[str, int]:
        return {name: layer.rank for name, layer in self.factors.items()}


@torch.no_grad()
def compress(model: nn.Module, config, calibration_data: Iterable[Mapping] | None = None) -> Compression:
    """Factors for the layers of a model that `config` names; the model itself is not changed.

    Args:
        model: a transformers model with its head, or any module whose layers are named in `config.target_modules`.
        config ([`MixedRankConfig`])
        calibration_data (iterable of mappings, *optional*): instead of `config.calibration_data`.

    Raises:
        UnsupportedArchitectureError, CalibrationError, BudgetError, MissingWeightsError, ValueError: naming what does not fit.
    """
    data = config.calibration_data if calibration_data is None else calibration_data
    require_weights(model, "MixedRankConfig")
    if config.reference_model is not None:
        require_weights(config.reference_model, "MixedRankConfig.reference_model")
    names = find_targets(model, config)
    require_available(config.quantize_factors, model, config.mode)
    metric, compensation = methods(config, data is not None)
    batches = None if data is None else as_batches(data, config.max_calibration_batches, model=model)
    _require_backward(model, config, compensation)
    held_out, record = [], None
    if compensation == "kd":
        batches, held_out = split(batches, HELD_OUT, "compensation='kd'")
    with unpacked(model):
        if config.allocator == "auto":
            # What training would add to each candidate is not needed to compare them.
            trial = "lstsq" if compensation == "kd" else compensation
            config, record = choose_allocator(
                model, config, batches, lambda part: _Task(model, config, names, metric, trial, part)
            )
        task = _Task(model, config, names, metric, compensation, batches)
        found = task.factors(task.ranks(config))
        if held_out and found.factors:
            found.distillation = task.distil(found.factors, held_out)
    found.allocation = record
    _log(found, task)
    return found


def _require_backward(model: nn.Module, config, compensation: str) -> None:
    wanted_by = "layer_weight='fisher'" if config.layer_weight == "fisher" else "compensation='kd'"
    wanted = config.layer_weight == "fisher" or compensation == "kd"
    packed = find_packed(model) if wanted and config.mode == "replace" else None
    if packed is not None:
        raise ValueError(
            f"MixedRankConfig.{wanted_by} needs a backward pass, which {packed!r} has lost: bitsandbytes packed it at its "
            "first forward in evaluation mode. Load the model again and compress it before it runs"
        )


class _Task:
    """One compression: what is known of the layers before ranks are chosen, and the factors of chosen ranks."""

    def __init__(self, model, config, names, metric, compensation, batches):
        self.model, self.config, self.names, self.batches = model, config, names, batches
        self.compensation = compensation
        self.weights = Weights(model, config, names)
        self.fixed = fixed_ranks(model, names, config)
        reference = self.weights.reference
        self.groups = [(name,) for name in names] if metric == "plain" else input_groups(reference, names, batches)
        self.source = MetricSource(
            reference, self.groups, batches, metric, config, compensation == "none", self.weights.centred
        )
        self.spectra, self.statistics = {}, {}
        for name, moment, facts in self.source.layers():
            self.spectra[name] = self.weights.spectrum(name, moment)
            self.statistics[name] = facts
        warn_about_rows(model, self.statistics)
        if config.layer_weight == "fisher":
            energies = {name: spectrum.total for name, spectrum in self.spectra.items()}
            for name, weight in fisher_weights(reference, energies, batches, config.progress).items():
                self.spectra[name].weight = weight

    def ranks(self, config) -> dict[str, int]:
        """Ranks by layer name, under the allocator of `config`."""
        return allocate(self.model, [self.spectra[name] for name in self.names], self.fixed, config)

    def factors(self, ranks: Mapping[str, int]) -> Compression:
        facts = {n: {"relative_error": self.spectra[n].relative_error(ranks[n]), **self.statistics[n]} for n in ranks}
        result = Compression({}, [name for name in self.names if ranks[name] == DENSE], facts)
        kept = [tuple(name for name in group if ranks[name] != DENSE) for group in self.groups]
        groups = [group for group in kept if group]
        if groups and self.compensation != "none":
            found = _compensated(self, groups, ranks)
        else:
            found = {
                name: self._uncompensated(name, ranks[name], moment)
                for name, moment, _ in self.source.layers()
                if ranks[name] != DENSE
            }
        result.factors = {name: found[name] for name in self.names if name in found}
        return result

    def _uncompensated(self, name: str, rank: int, moment: torch.Tensor | None) -> LowRankLinear:
        weight = self.weights.missing(name)
        factors, mean = factorize(weight, rank, moment), self.source.means.get(name)
        shift = None if mean is None else bias_shift(weight, *factors, mean, mean)
        return self.weights.layer(name, *factors, shift=shift)

    def distil(self, factors: dict[str, LowRankLinear], held_out: Sequence[Mapping]) -> dict[str, float]:
        """Train the factors, in place; what was to be quantised is quantised after that."""
        config = self.config
        found = distil(
            self.model, factors, self.batches, held_out, config.compensation_steps, config.compensation_lr, config.seed,
            config.progress,
        )  # fmt: skip
        for layer in factors.values():
            self.weights.quantize(layer)
        return found


def _log(found: Compression, task: _Task) -> None:
    layers = [task.spectra[name] for name in found.factors]
    error = sum(facts["relative_error"] for facts in found.statistics.values()) / len(found.statistics)
    logger.info(
        "%d of %d layers have factors (ranks %d to %d): %d parameters %s %d; mean relative output error %.4f",
        len(layers), len(task.names), min(found.ranks.values(), default=0), max(found.ranks.values(), default=0),
        sum(layer.cost(found.ranks[layer.name]) for layer in layers),
        "beside" if task.weights.residual else "in the place of",
        sum(layer.dense_cost for layer in layers), error,
    )  # fmt: skip


def _compensated(task: _Task, groups, ranks) -> dict[str, LowRankLinear]:
    model, weights, config, compensation = task.model, task.weights, task.config, task.compensation
    blocks = find_blocks(model)
    if blocks is not None and not all(name.startswith(f"{blocks}.") for group in groups for name in group):
        blocks = None

    def start(group, device):
        size = dense_shape(model.get_submodule(group[0]))[0]
        return _Inputs(size, device, len(task.batches) if compensation == "gradient" else None)

    def build(group, inputs):
        if not inputs.moments.is_finite():
            raise CalibrationError(
                f"the inputs of module {group[0]!r} in the compressed model hold NaN or infinite values"
            )
        device = inputs.moments.products.device
        built = {}
        for name in group:
            weight, beside = weights.dense(name).to(device), weights.beside(name)
            if compensation == "gradient":
                moment = metric_matrix(inputs.moments, "second_moment", config.shrinkage, config.shrinkage_scale)
                factors = gradient_factors(
                    weight, inputs.proxy, ranks[name], moment, config.residual_ratio,
                    config.compensation_steps or GRADIENT_STEPS, config.compensation_lr or GRADIENT_LEARNING_RATE,
                    config.seed, config.progress,
                )  # fmt: skip
            else:
                factors = least_squares_factors(
                    weight, inputs.moments, ranks[name], config.shrinkage, config.shrinkage_scale,
                    config.compensation_ridge, None if beside is None else beside.to(device), weights.centred(name),
                )  # fmt: skip
            shift = bias_shift(weight, *factors, *inputs.moments.means()) if weights.centred(name) else None
            # What is trained afterwards is quantised after that.
            layer = weights.layer(name, *factors, quantized=compensation != "kd", shift=shift)
            built[name] = weights.in_place(name, layer)
        return built

    built = compress_in_order(model, weights.reference, blocks, groups, task.batches, start, build, config.progress)
    return {name: layer.factors if weights.residual else layer for name, layer in built.items()}


class _Inputs:
    """What stage 3 keeps of a group's inputs: their moments, and a few rows when they are needed."""

    def __init__(self, size: int, device: torch.device, proxy_batches: int | None):
        self.moments = CrossMoment(size, device)
        self.proxy = None if proxy_batches is None else ProxyRows(proxy_batches)

    def add_pair(self, rows: torch.Tensor, others: torch.Tensor) -> None:
        self.moments.add_pair(rows, others)
        if self.proxy is not None:
            self.proxy.add_pair(rows, others)


def compress_model(model: nn.Module, config, calibration_data: Iterable[Mapping] | None = None) -> nn.Module:
    """Compress a model in place, without PEFT: its targets become `LowRankLinear` layers.

    A transformers model is then ready for `save_pretrained`. Args and errors as of `compress`; after an error the model
    is as before. Residuals (`config.mode`) need `get_peft_model`.
    """
    if config.mode == "residual":
        raise ValueError("compress_model replaces layers; use get_peft_model for MixedRankConfig.mode='residual'")
    if config.keep_base_weights:
        raise ValueError(
            "compress_model replaces layers; use get_peft_model for MixedRankConfig.keep_base_weights=True"
        )
    for name, layer in compress(model, config, calibration_data).factors.items():
        trainable = model.get_submodule(name).weight.requires_grad
        model.set_submodule(name, layer.requires_grad_(trainable))
    return finished(model)


def finished(model: nn.Module) -> nn.Module:
    """A compressed model that saves and loads with its new shapes, if it is one of transformers."""
    changed = any(isinstance(module, LowRankLinear) for module in model.modules())
    if not changed or not isinstance(model, PreTrainedModel):
        return model
    quantizer = find_quantizer(model)
    if quantizer is None:
        return reshape_model(model)
    # Reshaping compares shapes unless it knows of a quantizer, and gives the model a configuration of its own.
    model.hf_quantizer = quantizer
    model = reshape_model(model)
    attach_quantizer(model, quantizer)
    return model
