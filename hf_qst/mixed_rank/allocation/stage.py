"""Stage 2: ranks for the targets of a model, as a configuration asks for them."""

from __future__ import annotations

import logging

from hf_qst.base_model.budget import Budget, BudgetError
from hf_qst.base_model.experts import enclosing_experts
from hf_qst.base_model.linear_layers import dense_shape, weight_count
from hf_qst.base_model.packed_weights import find_packed
from hf_qst.calibration import CalibrationError
from hf_qst.calibration.labels import are_own_labels
from hf_qst.mixed_rank.allocation.allocators import allocate_ranks
from hf_qst.mixed_rank.calibration_set import CalibrationSet
from hf_qst.mixed_rank.decomposition.spectrum import DENSE
from hf_qst.mixed_rank.decomposition.stage import Decomposition
from hf_qst.mixed_rank.expert_statistics import weigh_experts
from hf_qst.mixed_rank.sensitivity import SENSITIVITY_TOKENS, fisher_weights
from hf_qst.mixed_rank.sensitivity_from_disk import fisher_weights_from_disk
from hf_qst.mixed_rank.target_weights import TargetWeights

logger = logging.getLogger(__name__)


def layer_weight(weights: TargetWeights, calibration: CalibrationSet | None, settings) -> str:
    """What `"auto"` stands for: itself, where Fisher weights of a part of the tokens are to be had, or `"none"`."""
    wanted = settings.allocation.layer_weight
    if wanted != "auto":
        return wanted
    model = weights.model
    fits = calibration is not None and not weights.residual
    # The other metrics are for comparison, and uniform ranks take no errors into account.
    fits = fits and settings.decomposition.metric == "second_moment" and settings.allocation.allocator != "uniform"
    fits = fits and are_own_labels(model, calibration.batches) and find_packed(model) is None
    return "auto" if fits and not any(enclosing_experts(model, name) for name in weights.names) else "none"


def weigh(weights: TargetWeights, decomposition: Decomposition, calibration: CalibrationSet | None, settings) -> None:
    """Give each spectrum the weight of its layer's error that `layer_weight` asks for."""
    chosen = layer_weight(weights, calibration, settings)
    if chosen == "fisher":
        return weigh_layers(weights, decomposition, calibration)
    if chosen == "auto":
        try:
            return weigh_layers(weights, decomposition, calibration.rows(SENSITIVITY_TOKENS))
        except CalibrationError as error:
            logger.warning("layer_weight='auto': all layers' errors count the same, because of this: %s", error)
    weigh_experts(weights.model, decomposition)


def weigh_layers(weights: TargetWeights, decomposition: Decomposition, calibration: CalibrationSet) -> None:
    """Give each spectrum its layer's Fisher weight."""
    energies = {name: spectrum.total for name, spectrum in decomposition.spectra.items()}
    if weights.on_disk is not None:
        fisher = fisher_weights_from_disk(weights.on_disk, energies, calibration)
    else:
        fisher = fisher_weights(weights.reference, energies, calibration.batches, calibration.progress)
    for name, weight in fisher.items():
        decomposition.spectra[name].weight = weight


def allocate(weights: TargetWeights, decomposition: Decomposition, fixed: dict[str, int], settings) -> dict[str, int]:
    """Ranks by layer name.

    Args:
        weights: of the targets.
        decomposition: the result of stage 1.
        fixed: ranks that are given (`fixed_ranks`).
        settings ([`MixedRankConfig`]): resolved, with an allocator other than `"auto"`.

    Raises:
        BudgetError: no choice fits; the message names the smallest ratio that does.
    """
    layers, allocation = list(decomposition.spectra.values()), settings.allocation
    if len(fixed) == len(layers):
        return fixed
    targets = sum(one.dense_cost for one in layers)
    budget = Budget(settings.keep_ratio, settings.budget_scope, targets, weight_count(weights.model) - targets)
    parameters = budget.parameters
    if settings.residual:
        # Added to layers that stay: the budget is that of one rank in all of them.
        same = {one.name: min(settings.residual.rank, one.in_features, one.out_features) for one in layers} | fixed
        if allocation.allocator == "uniform":
            return same
        parameters = sum(one.cost(same[one.name]) for one in layers)
    try:
        return allocate_ranks(
            layers,
            parameters,
            allocator=allocation.allocator,
            rank_multiple=allocation.rank_multiple,
            min_rank_ratio=allocation.min_rank_ratio,
            allow_dense=allocation.allow_dense,
            fixed=fixed,
        )
    except BudgetError as error:
        if settings.residual:
            raise
        multiples = f"with ranks in multiples of {allocation.rank_multiple}"
        raise budget.error("MixedRankConfig.", error.smallest, multiples) from None


def fixed_ranks(weights: TargetWeights, settings) -> dict[str, int]:
    """Ranks by layer name of the layers that `rank_pattern` names."""
    # A layer without a residual is one that is not a target.
    least = 1 if settings.residual else DENSE
    fixed = {}
    # A longer name says more.
    for key, rank in sorted(settings.rank_pattern.items(), key=lambda item: len(item[0])):
        matching = [name for name in weights.names if name == key or name.endswith(f".{key}")]
        if not matching:
            raise ValueError(
                f"MixedRankConfig.rank_pattern names {key!r}, which is none of the {len(weights.names)} targets"
            )
        for name in matching:
            most = min(dense_shape(weights.model.get_submodule(name)))
            if not least <= rank <= most:
                raise ValueError(
                    f"MixedRankConfig.rank_pattern[{key!r}] must be from {least} to {most} for {name!r}, got {rank}"
                )
            fixed[name] = rank
    return fixed
