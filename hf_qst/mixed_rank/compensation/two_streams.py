"""Walks a model block by block with two streams of hidden states: the dense model's and the compressed one's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_qst.base_model.disk_weights import present
from hf_qst.base_model.experts import SplitExperts, enclosing_experts
from hf_qst.base_model.linear_layers import in_features
from hf_qst.calibration import calibration_mode, first_input, hooks
from hf_qst.mixed_rank.block_walk import Reached, StandIn
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


def replace_in_order(
    weights: TargetWeights,
    blocks: str | None,
    groups: Sequence[Group],
    calibration: CalibrationSet,
    fitting: Fitting,
) -> dict[str, nn.Module]:
    """Fit the replacement of each group of layers to what it is given when those before it are already replaced.

    Hidden states of both streams are kept between blocks, [tokens, hidden] each, and one block runs at a time. Within a
    block the dense stream runs once, and its inputs of the groups are kept; the compressed stream runs once for each
    group and does not compute again what modules gave whose layers are all replaced. The model itself is as before at the
    end, also after an error.

    Args:
        weights: with the model whose layers are replaced, and the dense model.
        blocks (`str`, *optional*):
            Path of the list of blocks that holds all the groups; without it, the models run whole for each group.
        groups: names of layers with one input, in the order in which they run.
        calibration: model inputs. What of a block's inputs and outputs does not fit its `memory_limit` is computed again.
        fitting: makes the replacements.
    """
    model, reference = weights.model, weights.reference
    whole = blocks is None
    dense = (_Stream if whole else _DenseBlocks)(reference, blocks, groups, weights.names, calibration)
    compressed = (_Stream if whole else _CompressedBlocks)(model, blocks, groups, weights.names, calibration)
    built: dict[str, nn.Module] = {}
    last = max(i for i, own in enumerate(dense.groups) if own)
    limit = calibration.memory_limit or _EXPERTS_BYTES

    def collect(stage: Sequence[Group], segment: int) -> dict[str, Inputs]:
        pool = pool_of(model, stage[0][0])
        names = [group[0] for group in stage] + ([] if pool is None else [pool])
        found = {name: fitting.inputs(name) for name in names}
        experts = enclosing_experts(model, stage[0][0])
        for number in range(len(calibration.batches)):
            others = dense.inputs(names, segment, number) if dense.calls[number] else {}
            if not others:
                continue  # a batch without images has nothing for a vision layer
            with _routed(experts, None if experts is None else dense.routing(experts[0], number)):
                rows = compressed.inputs(list(others), segment, number)
            for name, seen in rows.items():
                found[name].add_pair(seen, others[name].to(seen.device))
        return found

    with (
        calibration_mode(reference),
        calibration_mode(model),
        tqdm(total=len(groups), desc="compression", unit="group", disable=not calibration.progress) as bar,
    ):
        dense.begin()
        compressed.begin(dense if reference is model else None)
        for i, own in enumerate(dense.groups[: last + 1]):
            done: dict[str, nn.Module] = {}
            with present(dense.segments[i]), present(compressed.segments[i]):
                for stage in _stages(model, own, limit):
                    found = collect(stage, i)
                    pool, replaced = found.get(pool_of(model, stage[0][0])), {}
                    for group in stage:
                        replaced |= fitting.fit(group, found.pop(group[0]), pool)
                    compressed.replace(i, replaced)
                    done |= replaced
                    bar.update(len(stage))
                if i < last:
                    dense.advance(i)
                    compressed.advance(i)
            built |= weights.put_away(done)
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


class _Stream:
    """One of the two streams: a model, the block it has come to, and the hidden state of each batch there.

    Without blocks there is one segment, the model, and no hidden state on the way.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: str | None,
        groups: Sequence[Group],
        targets: Sequence[str],
        calibration: CalibrationSet,
    ):
        self.model, self.blocks, self.batches, self.calibration = model, blocks, calibration.batches, calibration
        # What all experts of a layer read is asked for too.
        pools = {pool_of(model, name) for name in targets} - {None}
        self.targets, self.run = targets, calibration.run_of(model, {*targets, *pools})
        self.replaced: dict[str, nn.Module] = {}
        # Bytes that may still be kept in this segment.
        self.limit = self.room = math.inf if calibration.memory_limit is None else calibration.memory_limit
        if blocks is None:
            self.segments, self.groups = [model], [list(groups)]
            return
        self.segments = list(model.get_submodule(blocks))
        self.paths = [f"{blocks}.{i}." for i in range(len(self.segments))]
        self.groups = [[group for group in groups if group[0].startswith(path)] for path in self.paths]

    def begin(self, like: _Stream | None = None) -> None:
        """Go to the first segment; `like` is another stream of the same model that is there."""
        if like is not None:
            self.calls, self.states = like.calls, list(like.states)
        elif self.blocks is None:
            self.calls = [[lambda model, hidden, batch=batch: self.run(batch)] for batch in self.batches]
            self.states = [None] * len(self.batches)
        else:
            self.calls, self.states = self.calibration.walk_of(self.run, self.blocks).start(self.batches)

    def inputs(self, names: Sequence[str], segment: int, number: int) -> dict[str, torch.Tensor]:
        """Rows [n, d] that these modules of a segment see of this batch, by name; of those that the batch reaches."""
        captured: dict[str, torch.Tensor] = {}

        def capture(name: str) -> Callable:
            def hook(module, args, kwargs):
                captured.setdefault(name, self.run.rows(name, first_input(args, kwargs))[0])
                if len(captured) == len(names):
                    raise Reached

            return hook

        self.run.enter(self.batches[number])
        modules = [(name, self.model.get_submodule(name)) for name in names]
        watch = [module.register_forward_pre_hook(capture(name), with_kwargs=True) for name, module in modules]
        with self.in_place(number), hooks(watch), suppress(Reached):
            self._call(segment, number)
        return captured

    def routing(self, experts: str, number: int) -> torch.Tensor:
        """The experts [tokens, k] that the layer at this path chose for the batch that `inputs` was asked for last."""
        return self.model.get_submodule(experts).last_routing

    def _call(self, segment: int, number: int) -> torch.Tensor:
        return self.calls[number][segment](self.segments[segment], self.states[number])

    def in_place(self, number: int):
        """The modules that stand in the place of the model's own when this batch runs."""
        return installed(self.model, self.replaced)

    def replace(self, segment: int, modules: Mapping[str, nn.Module]) -> None:
        self.replaced.update(modules)

    def advance(self, segment: int) -> None:
        """Take the hidden states to the next block."""
        for number in range(len(self.batches)):
            if self.calls[number]:
                with self.in_place(number):
                    self.states[number] = self._call(segment, number)
        self.replaced, self.room = {}, self.limit

    def take(self, size: int) -> bool:
        """Whether there is room to keep so many bytes, which is then theirs."""
        if size > self.room:
            return False
        self.room -= size
        return True


def _tensors(values) -> list[torch.Tensor]:
    return [each for each in (values if isinstance(values, (tuple, list)) else (values,)) if torch.is_tensor(each)]


def _versions(values) -> list[int]:
    """How often each tensor was changed in place; not known of those made in inference mode."""
    return [0 if each.is_inference() else each._version for each in _tensors(values)]


class _DenseBlocks(_Stream):
    """The dense stream: each block runs once, and the inputs of all its groups are kept until they are asked for."""

    def begin(self, like: _Stream | None = None) -> None:
        super().begin(like)
        self.seen: dict[tuple[str, int], torch.Tensor | None] = {}
        self.following: list[torch.Tensor | None] = [None] * len(self.batches)
        self.chosen: dict[tuple[str, int], torch.Tensor] = {}

    def inputs(self, names: Sequence[str], segment: int, number: int) -> dict[str, torch.Tensor]:
        if self.following[number] is None:
            self._watch(segment, number)
        found = {name: self.seen.pop((name, number)) for name in names if (name, number) in self.seen}
        if again := [name for name in names if name not in found]:
            found |= super().inputs(again, segment, number)
        return {name: rows for name, rows in found.items() if rows is not None}

    def routing(self, experts: str, number: int) -> torch.Tensor:
        return self.chosen[experts, number]

    def _watch(self, segment: int, number: int) -> None:
        """Run the block, and keep the inputs for which there is room."""
        self.run.enter(self.batches[number])
        unreached = {group[0] for group in self.groups[segment]}
        unreached |= {pool_of(self.model, name) for name in unreached} - {None}

        def keep(name: str):
            def hook(module, args, kwargs):
                if name in unreached:
                    unreached.remove(name)
                    rows = self.run.rows(name, first_input(args, kwargs))[0]
                    if self.take(rows.numel() * rows.element_size()):
                        self.seen[name, number] = rows

            return hook

        watched = [(self.model.get_submodule(name), keep(name)) for name in unreached]
        with hooks(module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in watched):
            self.following[number] = self._call(segment, number)
        self.seen.update({(name, number): None for name in unreached})
        for path, module in self.segments[segment].named_modules():
            if isinstance(module, SplitExperts):
                self.chosen[f"{self.paths[segment]}{path}", number] = module.last_routing

    def advance(self, segment: int) -> None:
        if not self.groups[segment]:
            super().advance(segment)
            return
        self.states, self.following = self.following, [None] * len(self.batches)
        self.seen, self.chosen, self.room = {}, {}, self.limit


class _CompressedBlocks(_Stream):
    """The compressed stream: what a module gave whose layers are all final is kept until the block is done.

    A run ends where the first layer is that is not final, so that everything before it is.
    """

    def begin(self, like: _Stream | None = None) -> None:
        super().begin(like)
        self.kept: dict[str, _Kept] = {}
        self._keep_final(0)

    def inputs(self, names: Sequence[str], segment: int, number: int) -> dict[str, torch.Tensor]:
        rows = super().inputs(names, segment, number)
        if len(rows) < len(names):
            # The run went on behind layers that are still to be replaced.
            for each in self.kept.values():
                each.forget(number)
        return rows

    @contextmanager
    def in_place(self, number: int) -> Iterator[None]:
        with installed(self.model, {**self.replaced, **self.kept}):
            for each in self.kept.values():
                each.begin(number)
            yield

    def replace(self, segment: int, modules: Mapping[str, nn.Module]) -> None:
        super().replace(segment, modules)
        self._keep_final(segment)

    def _keep_final(self, segment: int) -> None:
        path, groups = self.paths[segment], self.groups[segment]
        left = [name for group in groups for name in group if name not in self.replaced]
        if not left:
            return  # what is kept already serves the last run
        # What an expert gives is not kept: in the last run the model's own router chooses its tokens.
        experts = [name for name in self.targets if name.startswith(path) and enclosing_experts(self.model, name)]
        left = [*left, *experts]
        final = [name for name in self.targets if name.startswith(path) and name not in left]
        parts = {_largest_part(self.model, name, path, left) for name in final}
        # A larger part has nothing yet to give, and runs once with what those inside it gave.
        inside = {n for n in self.kept if any(n.startswith(f"{part}.") for part in parts - self.kept.keys())}
        for name in self.kept.keys() - parts - inside:
            self.room += self.kept[name].size
        # The outer ones are put in place last, around the inner ones.
        names = sorted(parts | inside, key=lambda name: -name.count("."))
        self.kept = {name: self.kept.get(name) or _Kept(self._module(name), self) for name in names}

    def _module(self, name: str) -> nn.Module:
        return self.replaced[name] if name in self.replaced else self.model.get_submodule(name)

    def advance(self, segment: int) -> None:
        super().advance(segment)
        self.kept = {}
        self._keep_final(segment + 1)


def _largest_part(model: nn.Module, name: str, path: str, left: Sequence[str]) -> str:
    """The largest module inside the block at `path` that holds the module `name` and none of those that are left."""
    parts = name.removeprefix(path).split(".")
    for count in range(1, len(parts)):
        part = path + ".".join(parts[:count])
        is_called = type(model.get_submodule(part)).forward is not nn.Module.forward  # a list of modules is not
        if is_called and not any(one.startswith(f"{part}.") for one in left):
            return part
    return name


class _Kept(StandIn):
    """Gives for a batch what the module gave for it before, call by call."""

    def __init__(self, module: nn.Module, stream: _Stream):
        super().__init__(module)
        self.stream = stream
        self.size = 0
        self._outputs: dict[int, list] = {}

    def begin(self, number: int) -> None:
        self._batch, self._call = self._outputs.setdefault(number, []), 0

    def forget(self, number: int) -> None:
        self._outputs.pop(number, None)

    def forward(self, *args, **kwargs):
        at, self._call = self._call, self._call + 1
        if at < len(self._batch) and self._batch[at] is not None:
            output, versions = self._batch[at]
            # Something that changed the output in place will do it again.
            if _versions(output) == versions:
                return output
        output = self.module(*args, **kwargs)
        size = sum(each.numel() * each.element_size() for each in _tensors(output))
        entry = (output, _versions(output)) if self.stream.take(size) else None
        self.size += size if entry else 0
        if at < len(self._batch):
            self._batch[at] = entry
        else:
            self._batch.append(entry)
        return output
