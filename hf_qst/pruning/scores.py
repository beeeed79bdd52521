"""Pruning methods that need no training: each gives every channel a score."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_qst.base_model.decoder_stack import DecoderStack, Projections
from hf_qst.base_model.experts import enclosing_experts, is_fused, put_back, split, summed_by_middle
from hf_qst.base_model.linear_layers import dense_weight
from hf_qst.calibration import CalibrationError, CalibrationRun, calibration_mode, first_input, hooks
from hf_qst.pruning.layout import SELECTIONS, PruningLayout


class InputStatistics:
    """First and second moment of each input channel [d_in] of a linear layer, over all tokens; sums are float64."""

    def __init__(self):
        self.count = 0
        self._sum = self._squares = 0.0

    def add(self, rows: torch.Tensor) -> None:
        """rows: [n, d_in]."""
        rows = rows.double()
        self.count += len(rows)
        self._sum, self._squares = self._sum + rows.sum(0), self._squares + rows.square().sum(0)

    @property
    def mean(self) -> torch.Tensor:
        """float32 [d_in]."""
        return self._over_rows(self._sum).float()

    @property
    def second_moment(self) -> torch.Tensor:
        """float32 [d_in], uncentred."""
        return self._over_rows(self._squares).float()

    @property
    def variance(self) -> torch.Tensor:
        """float32 [d_in]."""
        variance = self._over_rows(self._squares) - self._over_rows(self._sum).square()
        return variance.clamp(min=0).float()

    def _over_rows(self, total: torch.Tensor) -> torch.Tensor:
        """The mean; of an expert that saw no token it is 0."""
        return total / max(self.count, 1)


@dataclass
class PruningTask:
    """What a pruning method is given.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Dense; a method leaves it as it is. The experts of a mixture are split (`experts_as_layers`).
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
        """For each block the statistics of its linear layers' inputs, by path inside the block; experts are split.

        Raises:
            CalibrationError: the data do not reach a layer, or make it see NaN.
        """
        prefix = f"{self.stack.path}.{self.stack.architecture.blocks}"
        found: list[dict[str, InputStatistics]] = [{} for _ in range(self.layout.num_layers)]
        firsts = {}
        for i, block in enumerate(found):
            names = self.stack.projections(self.stack.blocks[i])
            experts = [(path,) for paths in expert_layers(self.stack.blocks[i], names) for path in paths]
            for paths in (*names.of_one_input, *experts):
                one = firsts[f"{prefix}.{i}.{paths[0]}"] = InputStatistics()
                block.update(dict.fromkeys(paths, one))
        run = CalibrationRun(self.model, list(firsts))
        run.prepare(self.calibration_data)

        def collect(name: str) -> Callable:
            return lambda module, args, kwargs: firsts[name].add(run.rows(name, first_input(args, kwargs))[0])

        handles = [self.model.get_submodule(n).register_forward_pre_hook(collect(n), with_kwargs=True) for n in firsts]
        with hooks(handles), calibration_mode(self.model):
            for batch in tqdm(self.calibration_data, desc="calibration", unit="batch", leave=False):
                run(batch)
        for name, one in firsts.items():
            if one.count == 0 and enclosing_experts(self.model, name) is None:
                raise CalibrationError(f"module {name!r} sees no rows of calibration_data")
            if one.count and not one.second_moment.isfinite().all():
                raise CalibrationError(f"the inputs of module {name!r} hold NaN or infinite values")
        return found


def expert_layers(block: nn.Module, names: Projections) -> list[tuple[str, str]]:
    """Paths inside the block of the two layers of each of its experts, while they are split; none without experts."""
    if not names.experts:
        return []
    experts = block.get_submodule(names.experts)
    return [tuple(f"{names.experts}.{index}.{name}" for name in experts.names) for index in range(len(experts))]


@contextmanager
def experts_as_layers(stack: DecoderStack) -> Iterator[None]:
    """The experts of all blocks as linear layers of their own for a while, which share the memory of the fused ones."""
    taken = []
    for block in stack.blocks:
        path = stack.projections(block).experts
        taken.append((block, split(block, [path] if path and is_fused(block.get_submodule(path)) else [])))
    try:
        yield
    finally:
        for block, fused in taken:
            put_back(block, fused)


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
        allocation (`str`): how its scores become widths if nothing else is said, one of `ALLOCATIONS`.
    """

    score: Callable[[PruningTask], Scores]
    needs_data: bool = False
    keeps_means: bool = False
    allocation: str = "uniform"


ALLOCATIONS = ("uniform", "global", "per_weight")
"""How scores become widths.

- `"uniform"`: the same part of every selection stays;
- `"global"`: selections compete by their standardised scores, so that widths differ;
- `"per_weight"`: by score for each weight that goes with a channel, for scores that are losses.
"""


def require_allocation(allocation: str) -> None:
    if allocation not in ALLOCATIONS:
        raise ValueError(f"allocation must be one of {', '.join(ALLOCATIONS)}, got {allocation!r}")


PRUNING_METHODS: dict[str, PruningMethod] = {}
"""The registered methods by name."""


def register_pruning_method(
    name: str,
    function: Callable[[PruningTask], Scores],
    needs_data: bool = False,
    keeps_means: bool = False,
    allocation: str = "uniform",
) -> None:
    """Make a pruning method known to `prune_model` by a name.

    Args:
        name (`str`): new, or that of a method to replace.
        function: gives `Scores` for a [`PruningTask`].
        needs_data, keeps_means (`bool`), allocation (`str`): see [`PruningMethod`]; means need data.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"name must be a non-empty string, got {name!r}")
    if not callable(function):
        raise ValueError(f"function of pruning method {name!r} must be callable, got {function!r}")
    require_allocation(allocation)
    PRUNING_METHODS[name] = PruningMethod(function, needs_data or keeps_means, keeps_means, allocation)


def random_scores(task: PruningTask) -> Scores:
    """Uniform random numbers: the same for the same seed."""
    generator = torch.Generator().manual_seed(task.seed)
    draw = lambda name, layer: torch.rand(task.layout.size(name, layer), generator=generator)
    return [{name: draw(name, layer) for name in SELECTIONS} for layer in range(task.layout.num_layers)]


def summed_over_weights(
    task: PruningTask, importance: Callable[[torch.Tensor, int, str], torch.Tensor], middle_by_readers: bool = False
) -> Scores:
    """Sums of the weights' importance over the weights that go when a channel goes.

    Args:
        importance: (W [d_in, d_out], the block's index, the layer's path in it) -> importance of its entries.
        middle_by_readers: whether a middle channel of an MLP is judged by the weights that read it alone.
    """
    scores = []
    for i, block in enumerate(task.stack.blocks):
        names, of_block = task.stack.projections(block), {}
        of = lambda path, i=i, block=block: importance(task.weight(block, path), i, path)
        if names.attention_out:
            of_block["attention_in"] = sum(of(path).sum(1) for path in names.attention_in)
            of_block["attention_out"] = of(names.attention_out).sum(0)
        if names.mlp_out:
            mlp_in, mlp_out = [of(path) for path in names.mlp_in], of(names.mlp_out)
            of_block["mlp_in"] = sum(part.sum(1) for part in mlp_in)
            of_block["mlp_out"] = mlp_out.sum(0)
            if not names.experts:
                written = sum(part.sum(0).unflatten(0, (names.mlp_stacked, -1)).sum(0) for part in mlp_in)
                of_block["mlp_middle"] = mlp_out.sum(1) + (0 if middle_by_readers else written)
        for first, last in expert_layers(block, names):
            mlp_in, mlp_out = of(first), of(last)
            written = summed_by_middle(block.get_submodule(names.experts), mlp_in.sum(0))
            parts = {
                "mlp_in": mlp_in.sum(1),
                "mlp_middle": mlp_out.sum(1) + (0 if middle_by_readers else written),
                "mlp_out": mlp_out.sum(0),
            }
            of_block |= {name: of_block.get(name, 0) + part for name, part in parts.items()}
        scores.append(of_block)
    return scores


def magnitude_scores(task: PruningTask) -> Scores:
    """L2 norm of the weights that go with a channel."""
    squares = summed_over_weights(task, lambda weight, i, path: weight.square())
    return [{name: total.sqrt() for name, total in block.items()} for block in squares]


def wanda_scores(task: PruningTask) -> Scores:
    """|W_ij| times the root mean square of input i, summed over the weights that go with a channel.

    Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024, equation 1, which ranks
    single weights; the sum over a structure is how it is used for structures.
    """
    root = lambda i, path: task.statistics[i][path].second_moment.sqrt()[:, None]
    return summed_over_weights(task, lambda weight, i, path: weight.abs() * root(i, path))


def flap_scores(task: PruningTask) -> Scores:
    """W_ij^2 times the variance of input i, summed over the weights that go with a channel.

    An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models", AAAI 2024, equation 5: what is
    lost when a channel is replaced by its mean. The paper scores what a layer reads; channels that a layer writes are
    given the sum over the weights that write them.
    """
    variance = lambda i, path: task.statistics[i][path].variance[:, None]
    return summed_over_weights(task, lambda weight, i, path: weight.square() * variance(i, path), True)


register_pruning_method("random", random_scores)
register_pruning_method("magnitude", magnitude_scores)
register_pruning_method("wanda", wanda_scores, needs_data=True)
register_pruning_method("flap", flap_scores, needs_data=True, keeps_means=True)
