"""The three stages one after another: from a dense model and a few batches to the factors of its layers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_qst.calibration import (
    CalibrationError,
    CrossMoment,
    as_batches,
    collect_statistics,
    input_groups,
    plan_passes,
)
from hf_qst.mixed_rank.allocation import DENSE, BudgetError, LayerSpectrum, allocate_ranks
from hf_qst.mixed_rank.compensation import ProxyRows, gradient_factors, least_squares_factors
from hf_qst.mixed_rank.decomposition import (
    factorize,
    metric_matrix,
    output_energies,
    output_error,
    shrinkage_intensity,
)
from hf_qst.mixed_rank.layer import (
    LowRankLinear,
    MixedRankLayer,
    dense_shape,
    dense_weight,
    float_dtype,
    is_linear,
)
from hf_qst.mixed_rank.sequential import compress_in_order
from hf_qst.mixed_rank.targets import find_blocks, find_targets, parameter_budget, weight_count
from hf_qst.packed_weights import unpacked
from hf_qst.reshaped_models import reshape_model

logger = logging.getLogger(__name__)

# Below this many rows for each input dimension more calibration data helps.
_ROWS_PER_DIMENSION = 4


@dataclass
class Compression:
    """The outcome: factors by layer name, the names of layers that stay dense, and what is known of each layer."""

    factors: dict[str, LowRankLinear] = field(default_factory=dict)
    dense: list[str] = field(default_factory=list)
    statistics: dict[str, dict] = field(default_factory=dict)

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
        UnsupportedArchitectureError, CalibrationError, BudgetError, ValueError: naming what does not fit.
    """
    data = config.calibration_data if calibration_data is None else calibration_data
    with unpacked(model):
        return _compress(model, config, data)


def _compress(model: nn.Module, config, data: Iterable[Mapping] | None) -> Compression:
    names = find_targets(model, config)
    metric, compensation = _methods(config, data is not None)
    batches = None if data is None else as_batches(data, config.max_calibration_batches)
    weights = _Weights(model, config, names)
    fixed = _fixed_ranks(model, names, config)

    reference = weights.reference
    groups = [(name,) for name in names] if metric == "plain" else input_groups(reference, names, batches[0])
    source = _MetricSource(reference, groups, batches, metric, config, keep=compensation == "none")
    result = Compression()
    spectra = {}
    for name, moment, facts in source.layers():
        spectra[name] = weights.spectrum(name, moment)
        result.statistics[name] = facts
    _warn_about_rows(model, result.statistics)
    ranks = _allocate(model, [spectra[name] for name in names], fixed, config)
    for name, rank in ranks.items():
        result.statistics[name] = {"relative_error": spectra[name].error(rank), **result.statistics[name]}
    result.dense = [name for name in names if ranks[name] == DENSE]
    kept = [tuple(name for name in group if ranks[name] != DENSE) for group in groups]
    groups = [group for group in kept if group]
    if groups and compensation != "none":
        result.factors = _compensated(model, weights, groups, batches, ranks, compensation, config)
    else:
        for name, moment, _ in source.layers():
            if ranks[name] != DENSE:
                result.factors[name] = weights.layer(name, *factorize(weights.missing(name), ranks[name], moment))
    result.factors = {name: result.factors[name] for name in names if name in result.factors}
    return result


class _Weights:
    """The weights that factors are made for: the model's own, or what it has lost against a dense reference."""

    def __init__(self, model: nn.Module, config, names: Sequence[str]):
        self.model, self.residual = model, config.mode == "residual"
        self.reference = _reference(model, config.reference_model, names) if self.residual else model
        for name in names:
            if not torch.isfinite(self.dense(name)).all():
                raise ValueError(f"the weight of {name!r} holds NaN or infinite values and cannot be compressed")

    def dense(self, name: str) -> torch.Tensor:
        """W [d_in, d_out] of the dense layer."""
        return dense_weight(self.reference.get_submodule(name))

    def beside(self, name: str) -> torch.Tensor | None:
        """The weight [d_in, d_out] that factors are added to, where they are."""
        return dense_weight(self.model.get_submodule(name)).to(self.dense(name).device) if self.residual else None

    def missing(self, name: str) -> torch.Tensor:
        """What the factors stand for [d_in, d_out]."""
        beside = self.beside(name)
        return self.dense(name) if beside is None else self.dense(name).double() - beside.double()

    def spectrum(self, name: str, moment: torch.Tensor | None) -> LayerSpectrum:
        """What a layer loses by rank, as a part of its whole output."""
        missing = self.missing(name)
        total = output_error(self.dense(name), moment) if self.residual else None
        return LayerSpectrum(name, *missing.shape, output_energies(missing, moment), total)

    def layer(self, name: str, left: torch.Tensor, right: torch.Tensor) -> LowRankLinear:
        """Factors A, B as a module on the device of the layer they are for."""
        module = self.model.get_submodule(name)
        bias = None if self.residual else module.bias
        device = module.weight.device
        layer = LowRankLinear.from_factors(
            left.to(device), right.to(device), bias, isinstance(module, Conv1D), float_dtype(module)
        )
        return layer.train(module.training)


def _reference(model: nn.Module, reference: nn.Module | None, names: Sequence[str]) -> nn.Module:
    if not isinstance(reference, nn.Module):
        raise ValueError(
            "MixedRankConfig.mode='residual' needs reference_model, the dense model with the same layers, got "
            f"{type(reference).__name__}"
        )
    for name in names:
        try:
            module = reference.get_submodule(name)
        except AttributeError:
            module = None
        if module is None or not is_linear(module) or dense_shape(module) != dense_shape(model.get_submodule(name)):
            found = (
                f"{list(dense_shape(module))}" if module is not None and is_linear(module) else type(module).__name__
            )
            raise ValueError(
                f"MixedRankConfig.reference_model must have a linear layer {name!r} of "
                f"{list(dense_shape(model.get_submodule(name)))} ([d_in, d_out]), found {found}"
            )
    return reference


def _methods(config, has_data: bool) -> tuple[str, str]:
    """The metric and the compensation that `"auto"` stands for."""
    metric, compensation = config.metric, config.compensation
    if metric == "auto" and not has_data and compensation in ("auto", "none"):
        logger.warning(
            "MixedRankConfig without calibration_data: the plain SVD of the weights is used, which ignores what the "
            "layers are used for"
        )
        metric = "plain"
    if metric == "auto":
        metric = "second_moment"
    if not has_data and metric != "plain":
        wanted = f"metric={metric!r}" if compensation in ("auto", "none") else f"compensation={compensation!r}"
        raise CalibrationError(f"MixedRankConfig.{wanted} needs calibration_data, got None")
    if compensation == "auto":
        compensation = "lstsq" if metric == "second_moment" else "none"
    return metric, compensation


class _MetricSource:
    """Each layer's matrix C and what was estimated of it, for as many layers at a time as memory allows.

    What one pass over the data can hold is kept for a second use when `keep` says that there is one.
    """

    def __init__(self, model, groups, batches, metric, config, keep):
        self.model, self.batches, self.metric, self.config = model, batches, metric, config
        self.kind = metric if metric in ("normalized", "representative") else "second_moment"
        self.plan = plan_passes(model, groups, self.kind, config.memory_limit if metric != "plain" else None)
        self.keep = keep and len(self.plan) == 1
        self.kept: dict | None = None

    def layers(self) -> Iterator[tuple[str, torch.Tensor | None, dict]]:
        """Yields each layer's name, its matrix C [d_in, d_in], and the rows and shrinkage behind it."""
        for index, groups in enumerate(self.plan):
            if self.metric == "plain":
                yield from ((name, None, {}) for group in groups for name in group)
                continue
            label = f"calibration {index + 1}/{len(self.plan)}"
            statistics = self.kept or collect_statistics(
                self.model, groups, self.batches, self.kind, self.config.progress, label
            )
            self.kept = dict(statistics) if self.keep else None
            for group in groups:
                yield from self._of_group(group, statistics.pop(group))

    def _of_group(self, group: tuple[str, ...], statistic) -> Iterator[tuple[str, torch.Tensor, dict]]:
        config = self.config
        moment = metric_matrix(statistic, self.metric, config.shrinkage, config.shrinkage_scale)
        facts = {"rows": statistic.count}
        if self.metric in ("second_moment", "normalized"):
            facts["shrinkage"] = shrinkage_intensity(statistic, config.shrinkage, config.shrinkage_scale)
        yield from ((name, moment, facts) for name in group)


def _fixed_ranks(model: nn.Module, names: Sequence[str], config) -> dict[str, int]:
    # A layer without a residual is one that is not a target.
    least = 1 if config.mode == "residual" else DENSE
    fixed = {}
    for key, rank in config.rank_pattern.items():
        matching = [name for name in names if name == key or name.endswith(f".{key}")]
        if not matching:
            raise ValueError(f"MixedRankConfig.rank_pattern names {key!r}, which is none of the {len(names)} targets")
        for name in matching:
            most = min(dense_shape(model.get_submodule(name)))
            if not least <= rank <= most:
                raise ValueError(
                    f"MixedRankConfig.rank_pattern[{key!r}] must be from {least} to {most} for {name!r}, got {rank}"
                )
            # A longer name says more.
            if name not in fixed or len(key) > fixed[name][0]:
                fixed[name] = len(key), rank
    return {name: rank for name, (_, rank) in fixed.items()}


def _allocate(model: nn.Module, layers: list[LayerSpectrum], fixed: dict[str, int], config) -> dict[str, int]:
    multiple = config.rank_multiple
    if multiple == "auto":
        multiple = 1 if min(min(layer.in_features, layer.out_features) for layer in layers) < 256 else 8
    if all(layer.name in fixed for layer in layers):
        # Every rank is given: there is nothing to allocate.
        return fixed
    if config.mode == "residual":
        return _allocate_residual(layers, fixed, multiple, config)
    names = [layer.name for layer in layers]
    budget = parameter_budget(model, names, config.keep_ratio, config.budget_scope)
    try:
        return allocate_ranks(
            layers, budget, config.allocator, multiple, config.min_rank_ratio, config.allow_dense, fixed
        )
    except BudgetError as error:
        targets = sum(layer.dense_cost for layer in layers)
        total = targets if config.budget_scope == "targets" else weight_count(model)
        # What the scope holds beside the targets is kept whatever is chosen.
        smallest = (error.smallest + total - targets) / total
        raise BudgetError(
            f"MixedRankConfig.keep_ratio={config.keep_ratio} of the {config.budget_scope}'s {total} parameters cannot "
            f"be reached with ranks in multiples of {multiple}: the smallest feasible keep_ratio is "
            f"{_round_up(smallest)}",
            error.smallest,
        ) from None


def _allocate_residual(layers: list[LayerSpectrum], fixed: dict[str, int], multiple: int, config) -> dict[str, int]:
    """Ranks for what is added to layers that stay: the budget is that of one rank in all of them."""
    same = {layer.name: min(config.residual_rank, layer.in_features, layer.out_features) for layer in layers} | fixed
    if config.allocator == "uniform":
        return same
    budget = sum(layer.cost(same[layer.name]) for layer in layers)
    return allocate_ranks(layers, budget, config.allocator, multiple, config.min_rank_ratio, False, fixed)


def _round_up(ratio: float) -> str:
    return f"{-(-ratio * 10_000 // 1) / 10_000:.4f}"


def _warn_about_rows(model: nn.Module, statistics: Mapping[str, dict]) -> None:
    short = {
        name: facts["rows"]
        for name, facts in statistics.items()
        if "rows" in facts and facts["rows"] < _ROWS_PER_DIMENSION * dense_shape(model.get_submodule(name))[0]
    }
    if short:
        name = max(short, key=lambda n: dense_shape(model.get_submodule(n))[0] / short[n])
        size = dense_shape(model.get_submodule(name))[0]
        fewer = "fewer rows than dimensions" if short[name] < size else "few rows"
        logger.warning(
            "calibration_data gives %s for %d layers: %r sees %d rows of %d dimensions; at least %d are recommended",
            fewer, len(short), name, short[name], size, _ROWS_PER_DIMENSION * size,
        )  # fmt: skip


def _compensated(model, weights, groups, batches, ranks, compensation, config) -> dict[str, nn.Module]:
    blocks = find_blocks(model)
    if blocks is not None and not all(name.startswith(f"{blocks}.") for group in groups for name in group):
        blocks = None

    def start(group, device):
        size = dense_shape(model.get_submodule(group[0]))[0]
        return _Inputs(size, device, len(batches) if compensation == "gradient" else None)

    def build(group, inputs):
        if not inputs.moments.is_finite():
            raise CalibrationError(
                f"the inputs of module {group[0]!r} in the compressed model hold NaN or infinite values"
            )
        device = inputs.moments.products.device
        built = {}
        for name in group:
            weight, beside = weights.dense(name).to(device), weights.beside(name)
            if compensation == "lstsq":
                factors = least_squares_factors(
                    weight, inputs.moments, ranks[name], config.shrinkage, config.shrinkage_scale,
                    config.compensation_ridge, None if beside is None else beside.to(device),
                )  # fmt: skip
            else:
                moment = metric_matrix(inputs.moments, "second_moment", config.shrinkage, config.shrinkage_scale)
                factors = gradient_factors(
                    weight, inputs.proxy, ranks[name], moment, config.residual_ratio, config.compensation_steps,
                    config.compensation_lr, config.seed, config.progress,
                )  # fmt: skip
            layer = weights.layer(name, *factors)
            # In the compressed stream a residual runs beside the layer it is for.
            built[name] = MixedRankLayer("residual", layer, model.get_submodule(name)) if weights.residual else layer
        return built

    built = compress_in_order(model, weights.reference, blocks, groups, batches, start, build, config.progress)
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
    for name, layer in compress(model, config, calibration_data).factors.items():
        trainable = model.get_submodule(name).weight.requires_grad
        model.set_submodule(name, layer.requires_grad_(trainable))
    return finished(model)


def finished(model: nn.Module) -> nn.Module:
    """A compressed model that saves and loads with its new shapes, if it is one of transformers."""
    changed = any(isinstance(module, LowRankLinear) for module in model.modules())
    return reshape_model(model) if changed and isinstance(model, PreTrainedModel) else model


def rank_report(model: nn.Module) -> list[dict]:
    """Name, shape [d_in, d_out], rank, rank as a part of the break-even rank, parameters and bytes of every linear
    layer.

    The rank of a dense layer is None. Factors count for the layer they belong to.
    """
    rows, inside = [], ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        low_rank = isinstance(module, LowRankLinear)
        if not low_rank and not is_linear(module):
            continue
        shape = (module.in_features, module.out_features) if low_rank else dense_shape(module)
        if low_rank:
            inside = (*inside, f"{name}.")
        rows.append(
            {
                "name": name,
                "shape": list(shape),
                "rank": module.rank if low_rank else None,
                "break_even_part": module.rank * sum(shape) / (shape[0] * shape[1]) if low_rank else None,
                "parameters": sum(p.numel() for p in module.parameters()),
                "bytes": sum(p.numel() * p.element_size() for p in module.parameters()),
            }
        )
    return rows
