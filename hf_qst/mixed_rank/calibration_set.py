"""The calibration data of one compression, read once, and what the stages ask of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from hf_qst.base_model.experts import enclosing_experts
from hf_qst.calibration import CalibrationError, as_batches, collect_statistics, input_groups, plan_passes
from hf_qst.mixed_rank.expert_statistics import is_pool, of_expert, pool_of, with_pools


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

    def input_groups(self, model: nn.Module, names: Sequence[str]) -> list[tuple[str, ...]]:
        """The named modules in the order in which they run, together when they are given one and the same tensor."""
        return input_groups(model, names, self.batches)

    def in_one_pass(self, model: nn.Module, groups: Sequence[tuple[str, ...]], kind: str) -> bool:
        """Whether all statistics fit into memory at a time."""
        return len(self._plan(model, groups, kind)) == 1

    def _plan(self, model: nn.Module, groups: Sequence[tuple[str, ...]], kind: str) -> list[list[tuple[str, ...]]]:
        groups = with_pools(model, groups) if kind == "second_moment" else groups
        return plan_passes(model, groups, kind, self.memory_limit)

    def statistics(self, model: nn.Module, groups: Sequence[tuple[str, ...]], kind: str) -> Iterator[tuple]:
        """Groups of modules with the statistic of their inputs, in as many passes as memory allows."""
        plan, pools = self._plan(model, groups, kind), {}
        for index, part in enumerate(plan):
            label = f"calibration {index + 1}/{len(plan)}"
            statistics = collect_statistics(model, part, self.batches, kind, self.progress, label)
            for group in part:
                statistic = statistics.pop(group)
                if is_pool(model, group):
                    pools = {group[0]: statistic}
                    continue
                if enclosing_experts(model, group[0]) is not None:
                    statistic = of_expert(statistic, pools.get(pool_of(model, group[0])))
                yield group, statistic
