"""Stage 1: each layer's spectrum, from the dense weights and the calibration data."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from hf_qst.base_model.linear_layers import dense_shape
from hf_qst.mixed_rank.calibration_set import ROWS_PER_DIMENSION, CalibrationSet
from hf_qst.mixed_rank.decomposition.factors import output_energies, output_error
from hf_qst.mixed_rank.decomposition.metrics import metric_matrix, shrinkage_intensity
from hf_qst.mixed_rank.decomposition.spectrum import LayerSpectrum
from hf_qst.mixed_rank.target_weights import TargetWeights

logger = logging.getLogger(__name__)


class Decomposition:
    """The result of stage 1.

    `groups` names the layers with one input, in the order in which they run; `spectra` has each layer's spectrum by name,
    in the order of the targets; `facts` the rows and the shrinkage behind its metric; `means` the mean input [d_in] of
    the layers whose bias takes it over.

    Args:
        weights: of the targets.
        settings ([`MixedRankConfig`]): resolved.
        calibration (*optional*): not needed by the metric `"plain"`.

    Raises:
        CalibrationError: the data does not reach a layer, or its inputs there are not finite.
    """

    def __init__(self, weights: TargetWeights, settings, calibration: CalibrationSet | None):
        self.weights, self.config, self.calibration = weights, settings.decomposition, calibration
        self.min_saving = settings.allocation.min_saving
        self.means: dict[str, torch.Tensor] = {}
        self.facts: dict[str, dict] = {}
        names, model = weights.names, weights.reference
        plain = self.config.metric == "plain"
        self.groups = [(name,) for name in names] if plain else calibration.input_groups(model, names)
        # Without compensation the factors need the metrics a second time, and from all rows.
        self._kept: list | None = None
        self._keep = settings.compensation.method == "none"
        spectra = {name: self._spectrum(name, moment) for name, moment in self.metrics()}
        self.spectra = {name: spectra[name] for name in names}
        _warn_about_rows(model, self.facts)

    def _spectrum(self, name: str, moment: torch.Tensor | None) -> LayerSpectrum:
        weight = self.weights.replaced(name)
        energies = output_energies(weight, moment)
        # A residual's errors, too, are relative to the output of the dense layer.
        total = output_error(self.weights.dense(name), moment) if self.weights.residual else energies.sum().item()
        return LayerSpectrum(name, *weight.shape, energies, total, min_saving=self.min_saving)

    def metrics(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Each layer's name and its matrix C [d_in, d_in] (None: the identity), while its weight is in memory."""
        metric = self.config.metric
        if metric == "plain":
            self.facts = {name: {} for group in self.groups for name in group}
            yield from ((name, None) for name in self.weights.in_turn(self.facts))
            return
        kind = metric if metric in ("normalized", "representative") else "second_moment"
        statistics = self._kept
        if statistics is None:
            source = self.weights.reference, self.groups, kind
            if not self._keep:
                statistics = self.calibration.spread().statistics(*source, ROWS_PER_DIMENSION)
            elif self.weights.on_disk is None and self.calibration.in_one_pass(*source):
                statistics = self._kept = list(self.calibration.statistics(*source))
            else:
                statistics = self.calibration.statistics(*source)
        for group, statistic in statistics:
            yield from self._of_group(group, statistic)

    def _of_group(self, group: tuple[str, ...], statistic) -> Iterator[tuple[str, torch.Tensor]]:
        config = self.config
        centred = {name: self.weights.centred(name) for name in group}
        moments = {
            flag: metric_matrix(statistic, config.metric, config.shrinkage, config.shrinkage_scale, flag)
            for flag in set(centred.values())
        }
        facts = {"rows": statistic.rows}
        if config.metric in ("second_moment", "normalized"):
            facts["shrinkage"] = shrinkage_intensity(statistic, config.shrinkage, config.shrinkage_scale)
        for name in group:
            self.facts[name] = facts
            if centred[name]:
                self.means[name] = statistic.sum / statistic.count
            yield name, moments[centred[name]]


def _warn_about_rows(model: nn.Module, facts: Mapping[str, dict]) -> None:
    sizes = {name: dense_shape(model.get_submodule(name))[0] for name, known in facts.items() if "rows" in known}
    rows = {name: facts[name]["rows"] for name in sizes}
    short = [name for name, size in sizes.items() if rows[name] < ROWS_PER_DIMENSION * size]
    if short:
        name = min(short, key=lambda one: rows[one] / sizes[one])
        logger.warning(
            "calibration_data gives %s for %d layers: %r sees %d rows of %d dimensions; at least %d are recommended",
            "fewer rows than dimensions" if rows[name] < sizes[name] else "few rows",
            len(short), name, rows[name], sizes[name], ROWS_PER_DIMENSION * sizes[name],
        )  # fmt: skip
