"""Pruning by scores: from what a pruning method says of every channel to the smaller model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from transformers import PreTrainedModel

from hf_qst.base_model.offloading import require_weights
from hf_qst.base_model.packed_weights import unpacked
from hf_qst.calibration import as_batches
from hf_qst.pruning.branch import find_prunable_stack, prune_blocks
from hf_qst.pruning.layout import SELECTIONS, PruningLayout
from hf_qst.pruning.options import PruningOptions, parameter_budget
from hf_qst.pruning.scores import (
    PRUNING_METHODS,
    PruningTask,
    Scores,
    expert_layers,
    experts_as_layers,
    require_allocation,
)
from hf_qst.pruning.widths import SelectionMap, best_channels, masks_by_layer, multiple_of, widths_on_budget
from hf_qst.tuner.config import is_count


def _ranks(scores: torch.Tensor) -> torch.Tensor:
    """Places of the scores among themselves, in (0, 1]; of equal ones the first is the higher."""
    order = torch.sort(scores, descending=True, stable=True).indices
    places = torch.empty(len(scores), dtype=torch.float64)
    places[order] = torch.arange(len(scores), 0, -1, dtype=torch.float64) / len(scores)
    return places


def _standardized(scores: torch.Tensor) -> torch.Tensor:
    """Scores with mean 0 and variance 1, so that selections of any scale can be compared."""
    centred = scores - scores.mean()
    return centred / centred.square().mean().sqrt().clamp(min=torch.finfo(scores.dtype).tiny)


def comparable_scores(
    method: str, scores: Scores, plan: SelectionMap, allocation: str | None = None
) -> list[torch.Tensor]:
    """A method's scores of each owner's channels, float64 [size] on the CPU, comparable between the owners.

    Scores of selections that are chosen together are added up.

    Args:
        method (`str`): a name in `PRUNING_METHODS`, which gave the scores.
        allocation (`str`, *optional*): one of `ALLOCATIONS`, by default the method's.

    Raises:
        ValueError: the method gives no finite scores of the right sizes.
    """
    allocation = allocation or PRUNING_METHODS[method].allocation
    owned = [torch.zeros(size, dtype=torch.float64) for size in plan.sizes]
    weights = [0] * len(owned)
    flat = [(i, selection) for i in range(plan.layout.num_layers) for selection in SELECTIONS]
    for owner, (i, selection) in zip(plan.owners, flat, strict=True):
        if owner is None:
            continue
        score = scores[i][selection].detach().double().cpu()
        if score.shape != owned[owner].shape or not score.isfinite().all():
            raise ValueError(
                f"pruning method {method!r} must give finite scores [{len(owned[owner])}] for {selection!r} of block {i}, "
                f"got shape {list(score.shape)}{'' if score.isfinite().all() else ' with NaN or infinity'}"
            )
        owned[owner] += score
        weights[owner] += plan.layout.weights_of_channel(selection, i)
    if allocation == "per_weight":
        # In logarithms, which order alike and spread evenly.
        return [(s / w).clamp(min=1e-300).log() for s, w in zip(owned, weights, strict=True)]
    return [(_ranks if allocation == "uniform" else _standardized)(score) for score in owned]


@torch.no_grad()
def prune_model(
    model: PreTrainedModel,
    method: str = "flap",
    keep_ratio: float = 0.5,
    budget_scope: str = "targets",
    calibration_data: Iterable[Mapping] | None = None,
    selections: Sequence[str] = SELECTIONS,
    constraint: str = "none",
    width_multiple: int | str = "auto",
    min_width: int = 1,
    allocation: str | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """Prune a model in place by scores, without training; the result has the form and size of DISP's.

    Args:
        model ([`~transformers.PreTrainedModel`]): of a supported decoder architecture, pre-norm.
        method (`str`): a name in `PRUNING_METHODS`.
        keep_ratio, budget_scope, selections, constraint, width_multiple, min_width: see [`PruningOptions`].
        calibration_data (iterable of mappings, *optional*):
            Batches of model inputs, for methods that need them; padding by `attention_mask` is left out.
        allocation (`str`, *optional*):
            `"uniform"`: the same part of every selection stays; `"global"`: selections compete by their standardised
            scores, so that widths differ; `"per_weight"`: they compete by score for each weight. By default the method's.
        seed (`int`): for methods that draw.

    Returns:
        The smaller model, which saves and loads with its new shapes.

    Raises:
        ValueError: an unknown method or allocation, no data for a method that needs them, an argument out of range.
        BudgetError: even the least widths are more than `keep_ratio`.
        UnsupportedArchitectureError: no decoder this package knows, or a post-norm one.
        CalibrationError: the data cannot be used.

    After an error the model is as before.
    """
    if method not in PRUNING_METHODS:
        raise ValueError(f"method must be one of {', '.join(PRUNING_METHODS)}, got {method!r}")
    require_allocation(PRUNING_METHODS[method].allocation if allocation is None else allocation)
    options = PruningOptions(keep_ratio, budget_scope, selections, constraint, width_multiple, min_width)
    if not is_count(seed, 0):
        raise ValueError(f"seed must be an integer of at least 0, got {seed!r}")
    chosen = PRUNING_METHODS[method]
    if chosen.needs_data and calibration_data is None:
        raise ValueError(
            f"pruning method {method!r} needs calibration_data: batches of model inputs, such as {{'input_ids': tensor}}"
        )
    require_weights(model, "prune_model")
    stack = find_prunable_stack(model)
    budget = parameter_budget(model, stack, options)
    batches = as_batches(calibration_data, model=model) if chosen.needs_data else None
    task = PruningTask(model, stack, PruningLayout.of(stack), batches, seed)
    with unpacked(model):
        with experts_as_layers(stack):
            plan = SelectionMap.of(task.layout, options.selections, constraint)
            owned = comparable_scores(method, chosen.score(task), plan, allocation)
            multiple = multiple_of(width_multiple, task.layout.hidden_size)
            widths = widths_on_budget(owned, plan, budget, multiple, min_width)
            masks = masks_by_layer(plan, best_channels(owned, widths))
            if chosen.keeps_means:
                _add_means_to_biases(task, masks)
        return prune_blocks(model, masks)


def prune_evenly(model: PreTrainedModel, options: PruningOptions) -> PreTrainedModel:
    """The sizes of a pruned model without a choice: the first channels of each selection stay, on the budget.

    Args:
        model: also without weights.
        options ([`PruningOptions`] or a configuration with its fields)
    """
    stack = find_prunable_stack(model)
    plan = SelectionMap.of(PruningLayout.of(stack), options.selections, options.constraint)
    scores = [torch.linspace(1, 0, size, dtype=torch.float64) for size in plan.sizes]
    budget = parameter_budget(model, stack, options)
    multiple = multiple_of(options.width_multiple, plan.layout.hidden_size)
    widths = widths_on_budget(scores, plan, budget, multiple, options.min_width)
    return prune_blocks(model, masks_by_layer(plan, best_channels(scores, widths)))


def _add_means_to_biases(task: PruningTask, masks: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """b + mean(x) W over the removed inputs, where a layer has a bias: what they gave on average stays."""
    for block, statistics, mask in zip(task.stack.blocks, task.statistics, masks, strict=True):
        names = task.stack.projections(block)
        readers = {"attention_in": names.attention_in, "mlp_in": names.mlp_in}
        readers["mlp_middle"] = (names.mlp_out,) if names.mlp_out and not names.experts else ()
        if names.experts:
            first, last = zip(*expert_layers(block, names), strict=True)
            readers |= {"mlp_in": (*names.mlp_in, *first), "mlp_middle": last}
        for selection, paths in readers.items():
            for path in paths:
                bias, mean = block.get_submodule(path).bias, statistics[path].mean
                if bias is not None:
                    lost = torch.where(mask[selection].to(mean.device), 0.0, mean)
                    bias += (lost @ task.weight(block, path)).to(bias.dtype)
