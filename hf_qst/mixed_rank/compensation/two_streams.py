"""Walks a model block by block with two streams of hidden states: the dense model's and the compressed one's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_qst.base_model.experts import SplitExperts, enclosing_experts
from hf_qst.base_model.linear_layers import in_features
from hf_qst.calibration import CalibrationRun, calibration_mode, first_input, hooks
from hf_qst.mixed_rank.calibration_set import CalibrationSet
from hf_qst.mixed_rank.expert_statistics import pool_of
from hf_qst.mixed_rank.predictions import installed
from hf_qst.mixed_rank.target_weights import TargetWeights

Group = tuple[str, ...]
# Experts of a layer are looked at together, as many as their moments take of memory without a limit of the user's.
_EXPERTS_BYTES = 2**31
_BYTES_PER_ENTRY = 16


class Inputs(Protocol):
    """What is kept of the inputs of one group."""

    def add_pair(self, rows: torch.Tensor, others: torch.Tensor) -> None:
        """Inputs [n, d] in the compressed and in the dense model, from one batch."""


class Fitting(Protocol):
    """How replacements are made."""

    def inputs(self, name: str) -> Inputs:
        """An empty collection for the inputs of a module."""

    def fit(self, group: Group, inputs: Inputs, pool: Inputs | None) -> dict[str, nn.Module]:
        """The modules that replace a group's, by name; `pool` is of all tokens of the layer that an expert is in."""


class _Reached(Exception):
    """Ends a forward pass where all inputs that were wanted are known."""


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
    groups: Sequence[Group],
    calibration: CalibrationSet,
    fitting: Fitting,
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
        fitting: makes the replacements.
    """
    model, reference, batches = weights.model, weights.reference, calibration.batches
    sides = [_Side(one, blocks, groups, batches) for one in (reference, model)]
    dense, compressed = sides
    built: dict[str, nn.Module] = {}
    last = max(i for i, own in enumerate(dense.groups) if own)
    limit = calibration.memory_limit or _EXPERTS_BYTES

    def collect(stage: Sequence[Group], segment: int, replaced: Mapping[str, nn.Module]) -> dict[str, Inputs]:
        pool = pool_of(model, stage[0][0])
        names = [group[0] for group in stage] + ([] if pool is None else [pool])
        found = {name: fitting.inputs(name) for name in names}
        experts = enclosing_experts(model, stage[0][0])
        for number in range(len(batches)):
            others = dense.inputs(names, segment, number)
            if not others:
                continue  # a batch without images has nothing for a vision layer
            routing = None if experts is None else reference.get_submodule(experts[0]).last_routing
            with installed(model, replaced), _routed(experts, routing):
                rows = compressed.inputs(names, segment, number)
            for name, other in others.items():
                found[name].add_pair(rows[name], other.to(rows[name].device))
        return found

    with (
        calibration_mode(reference),
        calibration_mode(model),
        tqdm(total=len(groups), desc="compression", unit="group", disable=not calibration.progress) as bar,
    ):
        for side in sides:
            side.begin()
        for i, own in enumerate(dense.groups[: last + 1]):
            replaced: dict[str, nn.Module] = {}
            for stage in _stages(model, own, limit):
                found = collect(stage, i, dict(replaced))
                pool = found.get(pool_of(model, stage[0][0]))
                for group in stage:
                    replaced.update(fitting.fit(group, found.pop(group[0]), pool))
                bar.update(len(stage))
            if i < last:
                dense.advance(i)
                with installed(model, replaced):
                    compressed.advance(i)
            built.update(replaced)
    return built


@contextmanager
def _routed(experts: tuple[str, SplitExperts, str] | None, routing: torch.Tensor | None) -> Iterator[None]:
    """Send the tokens to the experts that the dense model sends them to, so that its rows are those of this model."""
    if experts is None:
        yield
        return
    experts[1].forced_routing = routing
    try:
        yield
    finally:
        experts[1].forced_routing = None


def _stages(model: nn.Module, groups: Sequence[Group], limit: int) -> Iterator[list[Group]]:
    """The groups one by one, but the same layer of several experts together: they do not depend on each other.

    Args:
        limit (`int`): bytes that the moments of the experts of a stage may take, if there are several.
    """
    stages: dict[tuple[str, ...], list[Group]] = {}
    for group in groups:
        found = enclosing_experts(model, group[0])
        stages.setdefault(group if found is None else (found[0], found[2], "expert"), []).append(group)
    for stage in stages.values():
        size = in_features(model.get_submodule(stage[0][0]))
        count = max(1, limit // (_BYTES_PER_ENTRY * size * size))
        for start in range(0, len(stage), count):
            yield stage[start : start + count]


class _Side:
    """One of the two streams: a model, the block it has come to, and the hidden state of each batch there."""

    def __init__(self, model: nn.Module, blocks: str | None, groups: Sequence[Group], batches: Sequence[Mapping]):
        self.model, self.batches = model, batches
        names = [name for group in groups for name in group]
        pools = {pool_of(model, group[0]) for group in groups} - {None}
        self.run = CalibrationRun(model, [*names, *sorted(pools)])
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

    def inputs(self, names: Sequence[str], segment: int, number: int) -> dict[str, torch.Tensor]:
        """Rows [n, d] that these modules of a segment see of this batch, by name; of those that the batch reaches."""
        captured: dict[str, torch.Tensor] = {}

        def capture(name: str) -> Callable:
            def hook(module, args, kwargs):
                captured.setdefault(name, self.run.rows(name, first_input(args, kwargs))[0])
                if len(captured) == len(names):
                    raise _Reached

            return hook

        self.run.enter(self.batches[number])
        modules = [(name, self.model.get_submodule(name)) for name in names]
        with hooks(module.register_forward_pre_hook(capture(name), with_kwargs=True) for name, module in modules):
            try:
                self.calls[number][segment](self.segments[segment], self.states[number])
            except _Reached:
                return captured
        return captured

    def advance(self, segment: int) -> None:
        block = self.segments[segment]
        self.states = [call[segment](block, state) for call, state in zip(self.calls, self.states, strict=True)]
