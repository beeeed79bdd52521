"""The closed form of compensation."""

from __future__ import annotations

import torch

from hf_qst.calibration.moments import CrossMoment
from hf_qst.mixed_rank.decomposition.factors import factorize
from hf_qst.mixed_rank.decomposition.metrics import shrinkage_intensity


def least_squares_factors(
    weight: torch.Tensor,
    moments: CrossMoment,
    rank: int,
    shrinkage: str | float | None = "ledoit_wolf",
    shrinkage_scale: float = 1.0,
    ridge: float = 1e-4,
    kept: torch.Tensor | None = None,
    centred: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of rank `rank` that minimise E||z A B - x W||^2 + lambda ||A B - W||^2, in closed form.

    z is a row of inputs in the compressed model and x the same row in the dense one. With C = E[z'z], K = E[z'x] and
    lambda the shrinkage of C, the minimiser without a bound on the rank is W* = (C + lambda I)^-1 (K + lambda I) W, and
    its rank-r truncation in the metric C + lambda I is the one with it. The ridge pulls towards W, not towards zero.

    Args:
        weight: W [d_in, d_out] of the dense layer.
        moments: inputs in the partly compressed model (`add_pair`'s rows) and in the dense one (its others).
        rank (`int`)
        shrinkage, shrinkage_scale: as in `metric_matrix`.
        ridge (`float`): the least that lambda may be, as a part of the mean input energy tr(C)/d_in.
        kept: a weight [d_in, d_out] that stays and that the factors are added to: A B + kept stands for A B.
        centred (`bool`): take z and x less their means, for a layer whose bias makes up for these (`bias_shift`).

    Returns:
        A [d_in, rank] and B [rank, d_out] in float64.
    """
    weight = weight.double()
    kept = torch.zeros_like(weight) if kept is None else kept.double()
    intensity = max(shrinkage_intensity(moments, shrinkage, shrinkage_scale), ridge)
    moment = moments.shrunk(intensity, centred)
    if moment.trace() <= 0:
        return factorize(weight - kept, rank)
    cross = (1.0 - intensity) * moments.cross_moment(centred)
    # Shrinking leaves the trace as it is.
    cross.diagonal().add_(intensity * moment.trace() / len(moment))
    return factorize(torch.linalg.solve(moment, cross @ weight) - kept, rank, moment)


def bias_shift(
    weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, inputs: torch.Tensor, dense_inputs: torch.Tensor
) -> torch.Tensor:
    """What to add to the bias [d_out] so that the mean output of factors A, B is the dense layer's.

    Args:
        weight: W [d_in, d_out].
        left, right: A [d_in, rank], B [rank, d_out].
        inputs, dense_inputs: mean input [d_in] of the layer in the compressed and in the dense model.
    """
    return dense_inputs @ weight.double() - inputs @ left @ right
