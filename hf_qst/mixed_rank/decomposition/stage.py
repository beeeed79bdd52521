"""Stage 1: each layer's spectrum, from the dense weights and the calibration data."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from hf_qst.base_model.linear_layers import dense_shape
from hf_qst.mixed_rank.calibration_set import CalibrationSet
from hf_qst.mixed_rank.decomposition.metrics import metric_matrix, shrinkage_intensity
from hf_qst.mixed_rank.decomposition.spectrum import LayerSpectrum
from hf_qst.mixed_rank.target_weights import TargetWeights

logger = logging.getLogger(__name__)

# Below this many rows for each input dimension more calibration data helps.
_ROWS_PER_DIMENSION = 4


@dataclass
class Decomposition:
    """The result of stage 1.

    Args:
        groups: names of layers with one input, in the order in which they run.
        spectra: each layer's spectrum by name, in the order of the targets.
        facts: by name the rows and the shrinkage behind a layer's metric.
        metrics: gives the metrics again, for factors without compensation.
    """

    groups: list[tuple[str, ...]]
    spectra: dict[str, LayerSpectrum]
    facts: dict[str, dict]
    metrics: Metrics


def decompose(weights: TargetWeights, settings, calibration: CalibrationSet | None) -> Decomposition:
    """The spectra of all targets.

    Args:
        weights: of the targets.
        settings ([`MixedRankConfig`]): resolved.
        calibration (*optional*): not needed by the metric `"plain"`.

    Raises:
        CalibrationError: the data does not reach a layer, or its inputs there are not finite.
    """
    plain = settings.decomposition.metric == "plain"
    model = weights.reference
    groups = [(name,) for name in weights.names] if plain else calibration.input_groups(model, weights.names)
    metrics = Metrics(weights, groups, settings, calibration, keep=settings.compensation.method == "none")
    spectra, facts = {}, {}
    for name, moment, known in metrics:
        spectra[name], facts[name] = weights.spectrum(name, moment), known
    _warn_about_rows(model, facts)
    return Decomposition(groups, {name: spectra[name] for name in weights.names}, facts, metrics)


@dataclass
class Metrics:
    """Iterates over each layer's name, its matrix C [d_in, d_in] (None: the identity), and what is known of it.

    Statistics are held for as many layers at a time as memory allows, and kept for a second use if `keep` says that there
    is one and all fit. `means` has the mean input [d_in] of each layer whose bias takes it over.
    """

    weights: TargetWeights
    groups: list[tuple[str, ...]]
    settings: object
    calibration: CalibrationSet | None
    keep: bool
    means: dict[str, torch.Tensor] = field(default_factory=dict)
    kept: list[tuple] | None = None

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor | None, dict]]:
        metric = self.settings.decomposition.metric
        if metric == "plain":
            yield from ((name, None, {}) for group in self.groups for name in group)
            return
        kind = metric if metric in ("normalized", "representative") else "second_moment"
        statistics = self.kept
        if statistics is None:
            source = self.weights.reference, self.groups, kind
            statistics = self.calibration.statistics(*source)
            if self.keep and self.calibration.in_one_pass(*source):
                statistics = self.kept = list(statistics)
        for group, statistic in statistics:
            yield from self._of_group(group, statistic)

    def _of_group(self, group: tuple[str, ...], statistic) -> Iterator[tuple[str, torch.Tensor, dict]]:
        config = self.settings.decomposition
        centred = {name: self.weights.centred(name) for name in group}
        moments = {
            flag: metric_matrix(statistic, config.metric, config.shrinkage, config.shrinkage_scale, flag)
            for flag in set(centred.values())
        }
        self.means.update({name: statistic.sum / statistic.count for name in group if centred[name]})
        facts = {"rows": statistic.count}
        if config.metric in ("second_moment", "normalized"):
            facts["shrinkage"] = shrinkage_intensity(statistic, config.shrinkage, config.shrinkage_scale)
        yield from ((name, moments[centred[name]], facts) for name in group)


def _warn_about_rows(model: nn.Module, facts: Mapping[str, dict]) -> None:
    sizes = {name: dense_shape(model.get_submodule(name))[0] for name, known in facts.items() if "rows" in known}
    rows = {name: facts[name]["rows"] for name in sizes}
    short = [name for name, size in sizes.items() if rows[name] < _ROWS_PER_DIMENSION * size]
    if short:
        name = max(short, key=lambda one: sizes[one] / rows[one])
        logger.warning(
            "calibration_data gives %s for %d layers: %r sees %d rows of %d dimensions; at least %d are recommended",
            "fewer rows than dimensions" if rows[name] < sizes[name] else "few rows",
            len(short), name, rows[name], sizes[name], _ROWS_PER_DIMENSION * sizes[name],
        )  # fmt: skip
