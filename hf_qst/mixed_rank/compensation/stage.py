"""Stage 3: the factors of chosen ranks, layer after layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from hf_qst.base_model.experts import enclosing_experts
from hf_qst.base_model.linear_layers import in_features
from hf_qst.calibration import CalibrationError
from hf_qst.calibration.moments import CrossMoment
from hf_qst.mixed_rank.block_walk import by_blocks
from hf_qst.mixed_rank.calibration_set import CalibrationSet
from hf_qst.mixed_rank.compensation.gradient import ProxyRows, gradient_factors
from hf_qst.mixed_rank.compensation.least_squares import bias_shift, least_squares_factors
from hf_qst.mixed_rank.compensation.two_streams import replace_in_order
from hf_qst.mixed_rank.decomposition.factors import factorize
from hf_qst.mixed_rank.decomposition.metrics import metric_matrix
from hf_qst.mixed_rank.decomposition.spectrum import DENSE
from hf_qst.mixed_rank.decomposition.stage import Decomposition
from hf_qst.mixed_rank.expert_statistics import of_expert
from hf_qst.mixed_rank.layer import LowRankLinear
from hf_qst.mixed_rank.predictions import installed
from hf_qst.mixed_rank.target_weights import TargetWeights

COMPENSATIONS = ("lstsq", "none", "gradient", "kd")


def compensate(
    weights: TargetWeights,
    layers: Decomposition,
    ranks: Mapping[str, int],
    settings,
    calibration: CalibrationSet | None,
) -> dict[str, LowRankLinear]:
    """Factors by layer name, in the order of the targets; none for layers that stay dense.

    Args:
        weights: of the targets.
        layers: the result of stage 1.
        ranks: the result of stage 2.
        settings ([`MixedRankConfig`]): resolved.
        calibration (*optional*): not needed by the method `"none"` with the metric `"plain"`.
    """
    kept = [tuple(name for name in group if ranks[name] != DENSE) for group in layers.groups]
    groups = [group for group in kept if group]
    if not groups:
        return {}
    if settings.compensation.method == "none":
        factors = _uncompensated(weights, layers, ranks)
    else:
        factors = _compensated(weights, groups, ranks, settings, calibration)
    return {name: factors[name] for name in weights.names if name in factors}


def _uncompensated(weights: TargetWeights, layers: Decomposition, ranks: Mapping[str, int]) -> dict[str, LowRankLinear]:
    """The best factors for the dense model's inputs."""
    built = {}
    for name, moment in layers.metrics():
        if ranks[name] != DENSE:
            weight, mean = weights.replaced(name), layers.means.get(name)
            factors = factorize(weight, ranks[name], moment)
            shift = None if mean is None else bias_shift(weight, *factors, mean, mean)
            built |= weights.put_away({name: weights.layer(name, *factors, shift=shift)})
    return built


def _compensated(weights: TargetWeights, groups, ranks, settings, calibration) -> dict[str, LowRankLinear]:
    fitting, built = _Fitting(weights, ranks, settings, len(calibration.batches)), {}
    for blocks, own in by_blocks(weights.model, groups):
        with installed(weights.model, built):
            built |= replace_in_order(weights, blocks, own, calibration, fitting)
    return {name: layer.factors if weights.residual else layer for name, layer in built.items()}


class _Fitting:
    """Factors of one group of layers, from its inputs."""

    def __init__(self, weights: TargetWeights, ranks: Mapping[str, int], settings, batches: int):
        self.weights, self.ranks, self.settings, self.batches = weights, ranks, settings, batches
        self.method = settings.compensation.method

    def inputs(self, name: str) -> _Inputs:
        return _Inputs(in_features(self.weights.model.get_submodule(name)), self.batches, self.method)

    def fit(self, group: tuple[str, ...], inputs: _Inputs, pool: _Inputs | None) -> dict[str, nn.Module]:
        weights, settings = self.weights, self.settings
        if not inputs.moments.is_finite():
            raise CalibrationError(
                f"the inputs of module {group[0]!r} in the compressed model hold NaN or infinite values"
            )
        # An expert that sees few tokens has nothing to train on, and nothing to hold out.
        descends = self.method == "gradient" and inputs.moments.count > 1
        if enclosing_experts(weights.model, group[0]) is not None:
            inputs.moments = of_expert(inputs.moments, None if pool is None else pool.moments)
        fit_layer, built = _by_descent if descends else _by_least_squares, {}
        for name in group:
            factors = fit_layer(weights, name, inputs, self.ranks[name], settings)
            shift = None
            if weights.centred(name):
                shift = bias_shift(weights.dense(name).to(factors[0].device), *factors, *inputs.moments.means())
            # What is trained afterwards is quantised after that.
            layer = weights.layer(name, *factors, quantized=self.method != "kd", shift=shift)
            built[name] = weights.in_place(name, layer)
        return built


class _Inputs:
    """What is kept of a group's inputs: their moments, and a few rows where they are needed."""

    def __init__(self, size: int, batches: int, method: str):
        self.size = size
        self.moments: CrossMoment | None = None
        self.proxy = ProxyRows(batches) if method == "gradient" else None

    def add_pair(self, rows: torch.Tensor, others: torch.Tensor) -> None:
        self.moments = self.moments or CrossMoment(self.size, rows.device)
        if not len(rows):
            return
        self.moments.add_pair(rows, others)
        if self.proxy is not None:
            self.proxy.add_pair(rows, others)


def _by_least_squares(weights: TargetWeights, name: str, inputs: _Inputs, rank: int, settings):
    device, kept = inputs.moments.products.device, weights.kept(name)
    return least_squares_factors(
        weights.dense(name).to(device),
        inputs.moments,
        rank,
        shrinkage=settings.decomposition.shrinkage,
        shrinkage_scale=settings.decomposition.shrinkage_scale,
        ridge=settings.compensation.ridge,
        kept=None if kept is None else kept.to(device),
        centred=weights.centred(name),
    )


def _by_descent(weights: TargetWeights, name: str, inputs: _Inputs, rank: int, settings):
    config, compensation = settings.decomposition, settings.compensation
    moment = metric_matrix(inputs.moments, "second_moment", config.shrinkage, config.shrinkage_scale)
    return gradient_factors(
        weights.dense(name).to(moment.device),
        inputs.proxy,
        rank,
        moment,
        residual_ratio=compensation.residual_ratio,
        steps=compensation.steps,
        learning_rate=compensation.lr,
        seed=settings.seed,
        progress=settings.progress,
    )
