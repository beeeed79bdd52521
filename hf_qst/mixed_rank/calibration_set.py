"""The calibration data of one compression, read once, and what the stages ask of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from hf_qst.base_model.experts import enclosing_experts
from hf_qst.calibration import (
    CalibrationError,
    CalibrationRun,
    as_batches,
    collect_statistics,
    input_groups,
    plan_passes,
)
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
        spread = replace(self, batches=[self.batches[i] for i in order])
        spread._runs.update(self._runs)
        return spread

    def input_groups(self, model: nn.Module, names: Sequence[str]) -> list[tuple[str, ...]]:
        """The named modules in the order in which they run, together when they are given one and the same tensor."""
        return input_groups(model, names, self.batches, self.run_of(model, names))

    def in_one_pass(self, model: nn.Module, groups: Sequence[tuple[str, ...]], kind: str) -> bool:
        """Whether all statistics fit into memory at a time."""
        return len(self._plan(model, groups, kind)) == 1

    def _plan(self, model: nn.Module, groups: Sequence[tuple[str, ...]], kind: str) -> list[list[tuple[str, ...]]]:
        groups = with_pools(model, groups) if kind == "second_moment" else groups
        return plan_passes(model, groups, kind, self.memory_limit)

    def statistics(
        self, model: nn.Module, groups: Sequence[tuple[str, ...]], kind: str, rows_per_dimension: int | None = None
    ) -> Iterator[tuple]:
        """Groups of modules with the statistic of their inputs, in as many passes as memory allows.

        With `rows_per_dimension` a pass ends with the batch that brings every module so many rows.
        """
        plan, pools = self._plan(model, groups, kind), {}
        run = self.run_of(model, (name for part in plan for group in part for name in group))
        for index, part in enumerate(plan):
            label = f"calibration {index + 1}/{len(plan)}"
            statistics = collect_statistics(
                model, part, self.batches, kind, self.progress, label, run=run, rows_per_dimension=rows_per_dimension
            )
            for group in part:
                statistic = statistics.pop(group)
                if is_pool(model, group):
                    pools = {group[0]: statistic}
                    continue
                if enclosing_experts(model, group[0]) is not None:
                    statistic = of_expert(statistic, pools.get(pool_of(model, group[0])))
                yield group, statistic
