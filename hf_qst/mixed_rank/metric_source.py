"""Where each layer's metric comes from: the calibration data, as much of it at a time as memory allows."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from hf_qst.base_model.linear_layers import dense_shape
from hf_qst.calibration import CalibrationError, collect_statistics, plan_passes
from hf_qst.mixed_rank.decomposition import metric_matrix, shrinkage_intensity

logger = logging.getLogger(__name__)

# Below this many rows for each input dimension more calibration data helps.
_ROWS_PER_DIMENSION = 4


def methods(config, has_data: bool) -> tuple[str, str]:
    """The metric and the compensation that `"auto"` stands for."""
    metric, compensation = config.metric, config.compensation
    for name, value in (("allocator", "auto"), ("layer_weight", "fisher"), ("bias_correction", True)):
        if getattr(config, name) == value and not has_data:
            raise CalibrationError(f"MixedRankConfig.{name}={value!r} needs calibration_data, got None")
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


class MetricSource:
    """Each layer's matrix C and what was estimated of it, for as many layers at a time as memory allows.

    What one pass over the data can hold is kept for a second use when `keep` says that there is one. `centred` says of
    which layers the metric is that of the inputs less their mean; `means` then has it [d_in].
    """

    def __init__(self, model, groups, batches, metric, config, keep, centred):
        self.model, self.batches, self.metric, self.config = model, batches, metric, config
        self.kind = metric if metric in ("normalized", "representative") else "second_moment"
        self.plan = plan_passes(model, groups, self.kind, config.memory_limit if metric != "plain" else None)
        self.keep = keep and len(self.plan) == 1
        self.kept: dict | None = None
        self.centred = centred
        self.means: dict[str, torch.Tensor] = {}

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
        centred = {name: self.centred(name) for name in group}
        moments = {
            flag: metric_matrix(statistic, self.metric, config.shrinkage, config.shrinkage_scale, flag)
            for flag in set(centred.values())
        }
        self.means.update({name: statistic.sum / statistic.count for name in group if centred[name]})
        facts = {"rows": statistic.count}
        if self.metric in ("second_moment", "normalized"):
            facts["shrinkage"] = shrinkage_intensity(statistic, config.shrinkage, config.shrinkage_scale)
        yield from ((name, moments[centred[name]], facts) for name in group)


def warn_about_rows(model: nn.Module, statistics: Mapping[str, dict]) -> None:
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
