"""Walks a model block by block with two streams of hidden states: the dense model's and the compressed one's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_qst.calibration import CalibrationRun, calibration_mode, first_input, hooks
from hf_qst.mixed_rank.calibration_set import CalibrationSet
from hf_qst.mixed_rank.predictions import installed
from hf_qst.mixed_rank.target_weights import TargetWeights

Pair = tuple[torch.Tensor, torch.Tensor]


class _Reached(Exception):
    """Ends a forward pass at the module whose input was wanted."""


@dataclass
class _Call:
    """The arguments of one block in one batch but the hidden state: masks and positions, which the streams share."""

    args: tuple
    kwargs: dict

    def __call__(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        if "hidden_states" in self.kwargs:
            output = block(*self.args, **{**self.kwargs, "hidden_states": hidden})
        else:
            output = block(hidden, *self.args[1:], **self.kwargs)
        return output[0] if isinstance(output, tuple) else output


@contextmanager
def _captured(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """The input of `module` in the forward pass that runs inside, which ends there; none if it is not reached."""
    captured: list[torch.Tensor] = []

    def stop(module, args, kwargs):
        captured.append(first_input(args, kwargs))
        raise _Reached

    with hooks([module.register_forward_pre_hook(stop, with_kwargs=True)]):
        try:
            yield captured
        except _Reached:
            return


def _record(
    run: CalibrationRun, blocks: Sequence[nn.Module], batches: Sequence[Mapping]
) -> tuple[list[list[_Call]], list[torch.Tensor]]:
    """The calls of every block by batch, and the hidden state that enters the first."""
    calls: list[list[_Call]] = []
    states: list[torch.Tensor] = []

    def record(block, args, kwargs):
        if block is blocks[0]:
            states.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
        kept = {**kwargs, "hidden_states": None} if "hidden_states" in kwargs else kwargs
        calls[-1].append(_Call((None, *args[1:]) if args else args, kept))
        if block is blocks[-1]:
            raise _Reached

    with hooks(block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks):
        for batch in batches:
            calls.append([])
            try:
                run(batch)
            except _Reached:
                continue
    return calls, states


def replace_in_order(
    weights: TargetWeights,
    blocks: str | None,
    groups: Sequence[tuple[str, ...]],
    calibration: CalibrationSet,
    fit: Callable[[tuple[str, ...], Iterator[Pair]], dict[str, nn.Module]],
) -> dict[str, nn.Module]:
    """Fit the replacement of each group of layers to what it is given when those before it are already replaced.

    Hidden states of both streams are kept between blocks, [tokens, hidden] each, and one block runs at a time. The
    model itself is as before at the end, also after an error.

    Args:
        weights: with the model whose layers are replaced, and the dense model.
        blocks (`str`, *optional*):
            Path of the list of blocks that holds all the groups; without it, the models run whole for each group.
        groups: names of layers with one input, in the order in which they run.
        calibration: model inputs.
        fit: makes the modules that replace a group's, by name, from pairs of the group's inputs [n, d] in the compressed
            and in the dense model.
    """
    model, reference, batches = weights.model, weights.reference, calibration.batches
    sides = [_Side(one, blocks, groups, batches) for one in (reference, model)]
    dense, compressed = sides
    built: dict[str, nn.Module] = {}
    last = max(i for i, own in enumerate(dense.groups) if own)

    def pairs(name: str, segment: int, replaced: Mapping[str, nn.Module]) -> Iterator[Pair]:
        for number in range(len(batches)):
            others = dense.inputs(name, segment, number)
            if others is None:
                continue  # a batch without images has nothing for a vision layer
            with installed(model, replaced):
                rows = compressed.inputs(name, segment, number)
            yield rows, others.to(rows.device)

    with (
        calibration_mode(reference),
        calibration_mode(model),
        tqdm(total=len(groups), desc="compression", unit="group", disable=not calibration.progress) as bar,
    ):
        for side in sides:
            side.begin()
        for i, own in enumerate(dense.groups[: last + 1]):
            replaced: dict[str, nn.Module] = {}
            for group in own:
                replaced.update(fit(group, pairs(group[0], i, dict(replaced))))
                bar.update()
            if i < last:
                dense.advance(i)
                with installed(model, replaced):
                    compressed.advance(i)
            built.update(replaced)
    return built


class _Side:
    """One of the two streams: a model, the block it has come to, and the hidden state of each batch there."""

    def __init__(
        self, model: nn.Module, blocks: str | None, groups: Sequence[tuple[str, ...]], batches: Sequence[Mapping]
    ):
        self.model, self.batches = model, batches
        self.run = CalibrationRun(model, [name for group in groups for name in group])
        self.run.prepare(batches)
        if blocks is None:
            self.segments, self.groups = [model], [list(groups)]
        else:
            self.segments = list(model.get_submodule(blocks))
            self.groups = [[g for g in groups if g[0].startswith(f"{blocks}.{i}.")] for i in range(len(self.segments))]

    def begin(self) -> None:
        if self.segments == [self.model]:
            # Without blocks there is one segment, the model, and no hidden state on the way.
            self.calls = [[lambda model, hidden, batch=batch: self.run(batch)] for batch in self.batches]
            self.states = [None] * len(self.batches)
        else:
            self.calls, self.states = _record(self.run, self.segments, self.batches)

    def inputs(self, name: str, segment: int, number: int) -> torch.Tensor | None:
        """Rows [n, d] that module `name` in this segment sees of this batch; None if the batch does not reach it."""
        self.run.enter(self.batches[number])
        with _captured(self.model.get_submodule(name)) as captured:
            self.calls[number][segment](self.segments[segment], self.states[number])
        return self.run.rows(name, captured[0])[0] if captured else None

    def advance(self, segment: int) -> None:
        block = self.segments[segment]
        self.states = [call[segment](block, state) for call, state in zip(self.calls, self.states, strict=True)]
