"""Pruning without training: a method gives every channel a score, the rest is what DISP does with its logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_qst.base_model.decoder_stack import DecoderStack
from hf_qst.base_model.linear_layers import dense_weight
from hf_qst.base_model.offloading import require_weights
from hf_qst.base_model.packed_weights import unpacked
from hf_qst.calibration import as_batches, collect_statistics, plan_passes
from hf_qst.disp.config import DISPConfig
from hf_qst.disp.model import parameter_budget
from hf_qst.pruning.branch import find_prunable_stack, prune_blocks
from hf_qst.pruning.layout import SELECTIONS, PruningLayout
from hf_qst.pruning.widths import SelectionMap, best_channels, masks_by_layer, widths_on_budget

ALLOCATIONS = ("uniform", "global")
# Statistics of 4 GiB at a time; what does not fit waits for another pass over the data.
_STATISTICS_BYTES = 4 * 2**30
_NO_DATA = "pruning method {name!r} needs calibration_data: batches of model inputs, such as {{'input_ids': tensor}}"


@dataclass(frozen=True)
class InputStatistics:
    """Of each input channel [d_in] of a linear layer, over all tokens; float32."""

    mean: torch.Tensor
    second_moment: torch.Tensor

    @property
    def variance(self) -> torch.Tensor:
        return (self.second_moment - self.mean.square()).clamp(min=0)


@dataclass
class PruningTask:
    """What a pruning method is given.

    Args:
        model ([`~transformers.PreTrainedModel`]): dense; a method leaves it as it is.
        stack ([`DecoderStack`]): its blocks and what their linear layers are called.
        layout ([`PruningLayout`]): sizes of the selections.
        calibration_data (`list[dict]`, *optional*): batches of model inputs.
        seed (`int`): for methods that draw.
    """

    model: nn.Module
    stack: DecoderStack
    layout: PruningLayout
    calibration_data: list[dict] | None = None
    seed: int = 0

    def weight(self, block: nn.Module, path: str) -> torch.Tensor:
        """W [d_in, d_out] of y = x W + b, float32; `path` is relative to the block."""
        return dense_weight(block.get_submodule(path)).float()

    @cached_property
    def statistics(self) -> list[dict[str, InputStatistics]]:
        """For each block the statistics of its linear layers' inputs, by path inside the block.

        Raises:
            CalibrationError: the data do not reach a layer, or make it see NaN.
        """
        names = self.stack.architecture.projections
        readers = [names.attention_in, (names.attention_out,), names.mlp_in, (names.mlp_out,)]
        prefix = f"{self.stack.path}.{self.stack.architecture.blocks}"
        groups = [
            tuple(f"{prefix}.{i}.{path}" for path in paths) for i in range(self.layout.num_layers) for paths in readers
        ]
        found: list[dict[str, InputStatistics]] = [{} for _ in range(self.layout.num_layers)]
        for part in plan_passes(self.model, groups, memory_limit=_STATISTICS_BYTES):
            for group, moments in collect_statistics(self.model, part, self.calibration_data).items():
                second = moments.products.diagonal() / moments.count
                one = InputStatistics((moments.sum / moments.count).float(), second.float())
                for name in group:
                    index, path = name.removeprefix(f"{prefix}.").split(".", 1)
                    found[int(index)][path] = one
        return found


Scores = list[dict[str, torch.Tensor]]
"""For each block the scores of its five selections by name, [size] each; higher stays longer."""


@dataclass(frozen=True)
class PruningMethod:
    """A name for a function from a [`PruningTask`] to `Scores`.

    Args:
        score: the function.
        needs_data (`bool`): whether it reads `statistics` or the calibration data.
        keeps_means (`bool`):
            Whether what a removed input channel gave on average goes to the biases of the layers that read it; a layer
            without a bias gets none.
    """

    score: Callable[[PruningTask], Scores]
    needs_data: bool = False
    keeps_means: bool = False


PRUNING_METHODS: dict[str, PruningMethod] = {}
"""The registered methods by name."""


def register_pruning_method(
    name: str, function: Callable[[PruningTask], Scores], needs_data: bool = False, keeps_means: bool = False
) -> None:
    """Make a pruning method known to `prune_model` by a name.

    Args:
        name (`str`): new, or that of a method to replace.
        function: gives `Scores` for a [`PruningTask`].
        needs_data, keeps_means (`bool`): see [`PruningMethod`]; means need data.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"name must be a non-empty string, got {name!r}")
    if not callable(function):
        raise ValueError(f"function of pruning method {name!r} must be callable, got {function!r}")
    PRUNING_METHODS[name] = PruningMethod(function, needs_data or keeps_means, keeps_means)


# --- the methods -----------------------------------------------------------------------------------------------------


def random_scores(task: PruningTask) -> Scores:
    """Uniform random numbers: the same for the same seed."""
    generator = torch.Generator().manual_seed(task.seed)
    draw = lambda name: torch.rand(task.layout.size(name), generator=generator)
    return [{name: draw(name) for name in SELECTIONS} for _ in range(task.layout.num_layers)]


def _summed(task: PruningTask, importance: Callable, middle_by_readers: bool = False) -> Scores:
    """Sums of the weights' importance over the weights that go when a channel goes.

    Args:
        importance: (W [d_in, d_out], its `InputStatistics` or None) -> the importance of its entries [d_in, d_out].
        middle_by_readers: whether a middle channel of an MLP is judged by the weights that read it alone.
    """
    names = task.stack.architecture.projections
    scores = []
    for i, block in enumerate(task.stack.blocks):
        statistics = {} if task.calibration_data is None else task.statistics[i]
        of = lambda path, block=block, known=statistics: importance(task.weight(block, path), known.get(path))
        mlp_in = [of(path) for path in names.mlp_in]
        mlp_out = of(names.mlp_out)
        writers = 0 if middle_by_readers else sum(part.sum(0) for part in mlp_in)
        scores.append(
            {
                "attention_in": sum(of(path).sum(1) for path in names.attention_in),
                "attention_out": of(names.attention_out).sum(0),
                "mlp_in": sum(part.sum(1) for part in mlp_in),
                "mlp_middle": mlp_out.sum(1) + writers,
                "mlp_out": mlp_out.sum(0),
            }
        )
    return scores


def magnitude_scores(task: PruningTask) -> Scores:
    """L2 norm of the weights that go with a channel."""
    squares = _summed(task, lambda weight, statistics: weight.square())
    return [{name: total.sqrt() for name, total in block.items()} for block in squares]


def wanda_scores(task: PruningTask) -> Scores:
    """|W_ij| times the root mean square of input i, summed over the weights that go with a channel.

    Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024, equation 1, which ranks
    single weights; the sum over a structure is how it is used for structures.
    """
    return _summed(task, lambda weight, statistics: weight.abs() * statistics.second_moment.sqrt()[:, None])


def flap_scores(task: PruningTask) -> Scores:
    """W_ij^2 times the variance of input i, summed over the weights that go with a channel.

    An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models", AAAI 2024, equation 5: what is
    lost when a channel is replaced by its mean. The paper scores what a layer reads; channels that a layer writes are
    given the sum over the weights that write them.
    """
    return _summed(task, lambda weight, statistics: weight.square() * statistics.variance[:, None], True)


register_pruning_method("random", random_scores)
register_pruning_method("magnitude", magnitude_scores)
register_pruning_method("wanda", wanda_scores, needs_data=True)
register_pruning_method("flap", flap_scores, needs_data=True, keeps_means=True)


# --- from scores to a smaller model ----------------------------------------------------------------------------------


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


def _by_owner(name: str, scores: Scores, plan: SelectionMap) -> list[torch.Tensor]:
    """Scores of the owners, float64 on the CPU; those of selections that are chosen together are added up."""
    owned = [torch.zeros(size, dtype=torch.float64) for size in plan.sizes]
    flat = [(i, selection) for i in range(plan.layout.num_layers) for selection in SELECTIONS]
    for owner, (i, selection) in zip(plan.owners, flat, strict=True):
        if owner is None:
            continue
        score = scores[i][selection].detach().double().cpu()
        if score.shape != owned[owner].shape or not score.isfinite().all():
            raise ValueError(
                f"pruning method {name!r} must give finite scores [{len(owned[owner])}] for {selection!r} of block {i}, "
                f"got shape {list(score.shape)}{'' if score.isfinite().all() else ' with NaN or infinity'}"
            )
        owned[owner] += score
    return owned


@torch.no_grad()
def prune_model(
    model: PreTrainedModel,
    method: str = "flap",
    keep_ratio: float = 0.5,
    budget_scope: str = "targets",
    calibration_data: Iterable[Mapping] | None = None,
    selections: Sequence[str] = SELECTIONS,
    constraint: str = "none",
    width_multiple: int = 1,
    min_width: int = 1,
    allocation: str = "uniform",
    seed: int = 0,
) -> PreTrainedModel:
    """Prune a model in place by scores, without training; the result is of the same form and size as DISP's.

    Args:
        model ([`~transformers.PreTrainedModel`]): of a supported decoder architecture, pre-norm.
        method (`str`): a name in `PRUNING_METHODS`.
        keep_ratio, budget_scope, selections, constraint, width_multiple, min_width: as of [`DISPConfig`].
        calibration_data (iterable of mappings, *optional*):
            Batches of model inputs, for methods that need them; padding by `attention_mask` is left out.
        allocation (`str`):
            `"uniform"`: the same part of every selection stays; `"global"`: selections compete by their standardised
            scores, so that widths differ.
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
    if allocation not in ALLOCATIONS:
        raise ValueError(f"allocation must be one of {', '.join(ALLOCATIONS)}, got {allocation!r}")
    config = DISPConfig(
        keep_ratio=keep_ratio,
        budget_scope=budget_scope,
        selections=selections,
        constraint=constraint,
        width_multiple=width_multiple,
        min_width=min_width,
        seed=seed,
    )
    chosen = PRUNING_METHODS[method]
    if chosen.needs_data and calibration_data is None:
        raise ValueError(_NO_DATA.format(name=method))
    require_weights(model, "prune_model")
    stack = find_prunable_stack(model)
    budget = parameter_budget(model, stack, config)
    batches = as_batches(calibration_data, model=model) if chosen.needs_data else None
    task = PruningTask(model, stack, PruningLayout.of(stack), batches, seed)
    with unpacked(model):
        scores = chosen.score(task)
        plan = SelectionMap.of(task.layout, config.selections, constraint)
        comparable = _ranks if allocation == "uniform" else _standardized
        owned = [comparable(score) for score in _by_owner(method, scores, plan)]
        widths = widths_on_budget(owned, plan, budget, width_multiple, min_width)
        masks = masks_by_layer(plan, best_channels(owned, widths))
        if chosen.keeps_means:
            _add_means_to_biases(task, masks)
        return prune_blocks(model, masks)


def _add_means_to_biases(task: PruningTask, masks: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """b + mean(x) W over the removed inputs, where a layer has a bias: what they gave on average stays."""
    names = task.stack.architecture.projections
    readers = {"attention_in": names.attention_in, "mlp_in": names.mlp_in, "mlp_middle": (names.mlp_out,)}
    for block, statistics, mask in zip(task.stack.blocks, task.statistics, masks, strict=True):
        for selection, paths in readers.items():
            for path in paths:
                bias, mean = block.get_submodule(path).bias, statistics[path].mean
                if bias is not None:
                    lost = torch.where(mask[selection].to(mean.device), 0.0, mean)
                    bias += (lost @ task.weight(block, path)).to(bias.dtype)
