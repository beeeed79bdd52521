"""The calibration data of one compression, read once, and what the stages ask of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_qst.base_model.disk_weights import present
from hf_qst.base_model.experts import enclosing_experts
from hf_qst.base_model.linear_layers import in_features
from hf_qst.calibration import (
    CalibrationError,
    CalibrationRun,
    as_batches,
    calibration_mode,
    collect_statistics,
    input_groups,
    plan_passes,
)
from hf_qst.mixed_rank.block_walk import BlockWalk, by_blocks
from hf_qst.mixed_rank.expert_statistics import is_pool, of_expert, pool_of, with_pools

# Rows for each input dimension that a second moment is taken from where only its spectrum is wanted.
ROWS_PER_DIMENSION = 4


@dataclass(frozen=True)
class CalibrationSet:
    """Batches of model inputs, and how passes over them are made.

    Args:
        batches: model inputs.
        memory_limit (`int`, *optional*): bytes that input statistics may take at a time.
        progress (`bool`): whether to show progress bars.
    """

    batches: list[Mapping]
    memory_limit: int | None = None
    progress: bool = True
    _runs: dict = field(default_factory=dict, init=False, repr=False, compare=False)
    _walks: dict = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def read(cls, data: Iterable[Mapping], settings, model: nn.Module) -> CalibrationSet:
        """The batches in `data`, in any of the forms of `hf_qst.calibration.as_batches`."""
        batches = as_batches(data, settings.max_calibration_batches, model=model)
        return cls(batches, settings.memory_limit, settings.progress)

    def split(self, part: float, wanted_by: str) -> tuple[CalibrationSet, CalibrationSet]:
        """The first batches, and the last `part` of them: at least one each.

        Raises:
            CalibrationError: there is one batch only.
        """
        if len(self.batches) < 2:
            raise CalibrationError(
                f"{wanted_by} holds out a part of calibration_data and needs at least 2 batches, got 1"
            )
        held_out = max(1, int(part * len(self.batches)))
        return replace(self, batches=self.batches[:-held_out]), replace(self, batches=self.batches[-held_out:])

    def rows(self, tokens: int) -> CalibrationSet:
        """About so many tokens, one row at a time and one of each batch in turn: batches of text alone."""
        rows, longest = [], max(len(batch["input_ids"]) for batch in self.batches)
        for place in range(longest):
            for batch in self.batches:
                if place >= len(batch["input_ids"]):
                    continue
                rows.append({name: part[place : place + 1] for name, part in batch.items()})
                tokens -= rows[-1]["input_ids"].numel()
                if tokens <= 0:
                    return self._parts(rows)
        return self._parts(rows)

    def run_of(self, model: nn.Module, names: Iterable[str]) -> CalibrationRun:
        """A run of the model for the named modules, prepared; the same for the same model and modules."""
        key = model, frozenset(names)
        if key not in self._runs:
            self._runs[key] = CalibrationRun(model, sorted(key[1]))
            self._runs[key].prepare(self.batches)
        return self._runs[key]

    def spread(self) -> CalibrationSet:
        """The same batches in an order in which the first few stand for all of them."""
        order = torch.randperm(len(self.batches), generator=torch.Generator().manual_seed(0)).tolist()
        return self._parts([self.batches[i] for i in order])

    def _parts(self, batches: list[Mapping]) -> CalibrationSet:
        """These batches, of the rows of this set's own, with the runs that were prepared for those."""
        parts = replace(self, batches=batches)
        parts._runs.update(self._runs)
        return parts

    def input_groups(self, model: nn.Module, names: Sequence[str]) -> list[tuple[str, ...]]:
        """The named modules in the order in which they run, together when they are given one and the same tensor."""
        return input_groups(model, names, self.batches, self.run_of(model, names))

    def in_one_pass(self, model: nn.Module, groups: Sequence[tuple[str, ...]], kind: str) -> bool:
        """Whether all statistics fit into memory at a time."""
        return len(self._plan(model, groups, kind)) == 1

    def _plan(self, model: nn.Module, groups: Sequence[tuple[str, ...]], kind: str) -> list[list[tuple[str, ...]]]:
        groups = with_pools(model, groups) if kind == "second_moment" else groups
        return plan_passes(model, groups, kind, self.memory_limit)

    def walk_of(self, run: CalibrationRun, blocks: str) -> BlockWalk:
        """The way of a run's batches through a list of blocks; the same for the same run and list."""
        key = run, blocks
        if key not in self._walks:
            self._walks[key] = BlockWalk(run, blocks, self.batches[0])
        return self._walks[key]

    def statistics(
        self, model: nn.Module, groups: Sequence[tuple[str, ...]], kind: str, rows_per_dimension: int | None = None
    ) -> Iterator[tuple]:
        """Groups of modules with the statistic of their inputs, each while the weights of its block are in memory.

        The batches go through the model block by block where the blocks can be called so, else in as many passes as memory
        allows. With `rows_per_dimension` as many batches are run as bring every module so many rows.
        """
        plan = self._plan(model, groups, kind)
        run = self.run_of(model, (name for part in plan for group in part for name in group))
        (blocks, _), *others = by_blocks(model, groups)
        if blocks is not None and not others:
            with calibration_mode(model):
                walk = self.walk_of(run, blocks)
            if walk.skips:
                yield from self._by_block(walk, [group for part in plan for group in part], kind, rows_per_dimension)
                return
        pools: dict = {}
        for index, part in enumerate(plan):
            label = f"calibration {index + 1}/{len(plan)}"
            statistics = collect_statistics(
                model, part, self.batches, kind, self.progress, label, run=run, rows_per_dimension=rows_per_dimension
            )
            yield from _finished(model, part, statistics, pools)

    def _by_block(
        self, walk: BlockWalk, groups: Sequence[tuple[str, ...]], kind: str, rows_per_dimension: int | None
    ) -> Iterator[tuple]:
        run, model, pools = walk.run, walk.run.model, {}
        with calibration_mode(model):
            calls, states = walk.start(self.batches)
        numbers = [number for number, own in enumerate(calls) if own]
        # Other layers all see the same rows, and the widest decides how many are needed; experts see what is routed to them.
        routed = any(enclosing_experts(model, group[0]) is not None for group in groups)
        widest = max(in_features(model.get_submodule(group[0])) for group in groups)
        least = 0 if routed or rows_per_dimension is None else rows_per_dimension * widest
        last = max(i for i, path in enumerate(walk.paths) if any(group[0].startswith(path) for group in groups))
        for i in tqdm(range(last + 1), desc="calibration", unit="block", disable=not self.progress):
            following: dict[int, torch.Tensor] = {}

            def forward(number: int, i=i, following=following) -> None:
                run.enter(self.batches[number])
                with calibration_mode(walk.layers[i]):
                    following[number] = calls[number][i](walk.layers[i], states[number])

            own = [group for group in groups if group[0].startswith(walk.paths[i])]
            with present(walk.layers[i]):
                for part in plan_passes(model, own, kind, self.memory_limit):
                    statistics = collect_statistics(
                        model, part, numbers, kind, False, run=run, rows_per_dimension=rows_per_dimension,
                        least_rows=least, forward=forward,
                    )  # fmt: skip
                    if least:
                        numbers = sorted(following)
                    yield from _finished(model, part, statistics, pools)
                for number in numbers:
                    if number not in following and i < last:
                        forward(number)
            for number, state in following.items():
                states[number] = state


def _finished(model: nn.Module, part: Sequence[tuple[str, ...]], statistics: dict, pools: dict) -> Iterator[tuple]:
    """The statistics of a pass that are asked for, each freed when the next is taken; those of all experts go to `pools`."""
    for group in part:
        statistic = statistics.pop(group)
        if is_pool(model, group):
            pools.clear()
            pools[group[0]] = statistic
            continue
        if enclosing_experts(model, group[0]) is not None:
            statistic = of_expert(statistic, pools.get(pool_of(model, group[0])))
        yield group, statistic
