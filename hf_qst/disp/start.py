"""Where DISP's learning starts: from the scores of a pruning method, so that its first choice is that method's."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from hf_qst.base_model.decoder_stack import find_decoder_stack
from hf_qst.base_model.offloading import require_weights
from hf_qst.calibration import as_batches
from hf_qst.disp.selection import SelectionNetwork
from hf_qst.pruning.by_scores import comparable_scores
from hf_qst.pruning.layout import PruningLayout
from hf_qst.pruning.scores import PRUNING_METHODS, PruningTask, experts_as_layers
from hf_qst.tuner.stack_tuner import StackLayer

# The largest logit, and logits for each standard deviation of the scores. At the paper's 3 a draw drops every twentieth
# channel: more is lost by that than by pruning, and little is learned from such draws in a hundred steps.
_LIMIT, _SLOPE = 6.0, 6.0
_BISECTIONS = 60
# Of a trainer's data: rows in a batch, and tokens after which no further batch is read.
_ROWS, _TOKENS = 2, 4096


def start_from_scores(model: nn.Module, network: SelectionNetwork, data: Iterable[Mapping]) -> None:
    """Start a network at the choice of its `starting_method`.

    The logits are the method's scores, scaled to one slope and cut off where a draw is nearly sure; what is added to all of them
    makes the expected number of weights that a draw leaves equal to the budget.

    Args:
        model ([`~transformers.PreTrainedModel`]): dense; its stack may be wrapped already.
        data: batches of model inputs.

    Raises:
        CalibrationError: the data cannot be used.
    """
    require_weights(model, "DISPConfig.start_scores")
    stack, config = find_decoder_stack(model), network.config
    batches = as_batches(data, argument="DISPConfig.calibration_data", model=model)
    task = PruningTask(model, stack, PruningLayout.of(stack), batches, config.seed)
    with _without_adapters(model), experts_as_layers(stack):
        scores = PRUNING_METHODS[config.starting_method].score(task)
    scores = comparable_scores(config.starting_method, scores, network.plan)
    network.start_at(start_logits(scores, network))


@torch.no_grad()
def share_start(network: SelectionNetwork) -> None:
    """Give all processes of a training the first one's start: each may have seen other rows, and rounds as it likes."""
    if dist.is_available() and dist.is_initialized():
        for parameter in network.hypernetwork.parameters():
            dist.broadcast(parameter.data, 0)


def rows_of(dataloader: DataLoader, taken: Collection[str], seed: int) -> list[dict]:
    """A few batches of a training set, drawn without touching the training's own order.

    Args:
        dataloader ([`~torch.utils.data.DataLoader`]): the trainer's.
        taken: names of the model's inputs; what else is in a batch is dropped.
        seed (`int`): of the choice of rows; an iterable data set gives its first.
    """
    dataset, order = dataloader.dataset, None
    if not isinstance(dataset, IterableDataset):
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    batches, tokens = [], 0
    with torch.random.fork_rng(devices=[]):
        for batch in DataLoader(dataset, _ROWS, sampler=order, collate_fn=dataloader.collate_fn):
            batches.append({key: value for key, value in batch.items() if key in taken})
            tokens += max(value.numel() for value in batches[-1].values() if torch.is_tensor(value))
            if tokens >= _TOKENS:
                break
    return batches


@contextmanager
def _without_adapters(model: nn.Module) -> Iterator[None]:
    """The base's own function, whether the stack is wrapped or not."""
    layers = [module for module in model.modules() if isinstance(module, StackLayer)]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


def start_logits(
    scores: Sequence[torch.Tensor], network: SelectionNetwork, limit: float = _LIMIT, slope: float = _SLOPE
) -> list[torch.Tensor]:
    """Logits [size] of each owner that order channels as the scores do and are on the budget in expectation.

    Args:
        scores: of each owner's channels [size], comparable between owners.
        network ([`SelectionNetwork`]): whose plan and budget they are for.
        limit (`float`): the largest logit.
        slope (`float`): logits for each standard deviation of the scores.
    """
    every = torch.cat(list(scores))
    slope = slope / max(every.std().item(), 1e-12)

    def logits(threshold: float) -> list[torch.Tensor]:
        return [((score - threshold) * slope).clamp(-limit, limit) for score in scores]

    low, high = every.min().item() - limit / slope, every.max().item() + limit / slope
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        expected = [z.sigmoid().sum().item() for z in logits(middle)]
        if network.plan.parameters(expected) <= network.budget:
            high = middle
        else:
            low = middle
    return [z.float() for z in logits(high)]
