"""The matrix C in which the error of a layer is measured.

Every metric is the same solve (`hf_qst.mixed_rank.decomposition.factors`) with another C: the identity gives the plain
SVD, a diagonal the scaling of ASVD.
"""

from __future__ import annotations

import torch

from hf_qst.calibration.moments import MeanInput, SecondMoment

METRICS = ("second_moment", "normalized", "representative", "diagonal", "plain")
# The representative input has the rank of its number of positions at most.
_REPRESENTATIVE_RIDGE = 1e-3


def metric_matrix(
    statistic: SecondMoment | MeanInput | None,
    metric: str = "second_moment",
    shrinkage: str | float | None = "ledoit_wolf",
    shrinkage_scale: float = 1.0,
    centred: bool = False,
) -> torch.Tensor | None:
    """The matrix C [d_in, d_in] in which `metric` measures a layer's error; None stands for the identity.

    Args:
        statistic: what `hf_qst.calibration.collect_statistics` collected; not needed by `"plain"`.
        metric (`str`):
            `"second_moment"` and `"normalized"` (the statistic's own second moment), `"representative"` (with a ridge),
            `"diagonal"` (ASVD with exponent 0.5: the root mean square of each input channel), `"plain"`.
        shrinkage (`str` or `float`, *optional*):
            Part of the second moment that is replaced by its mean diagonal: `"ledoit_wolf"` estimates it, a float in
            [0, 1] gives it, None is 0. Without it the factors can be worse than the plain SVD's on new data.
        shrinkage_scale (`float`):
            Multiplies the estimate, which is too small when rows are correlated.
        centred (`bool`):
            Take the inputs less their mean: what a layer does to the mean is then left to its bias.
    """
    if metric == "plain":
        return None
    if metric == "diagonal":
        return statistic.second_moment().diagonal().sqrt().diag()
    if metric == "representative":
        moment = statistic.second_moment()
        moment.diagonal().add_(_REPRESENTATIVE_RIDGE * moment.trace() / len(moment))
        return moment
    return statistic.shrunk(shrinkage_intensity(statistic, shrinkage, shrinkage_scale), centred)


def shrinkage_intensity(statistic: SecondMoment, shrinkage: str | float | None, scale: float = 1.0) -> float:
    """The part in [0, 1] that `metric_matrix` replaces."""
    if shrinkage == "ledoit_wolf":
        return min(statistic.ledoit_wolf() * scale, 1.0)
    return float(shrinkage or 0.0)
