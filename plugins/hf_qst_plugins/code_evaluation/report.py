"""The figures of an evaluation."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from .pass_at_k import pass_at_k
from .samples_file import UNJUDGED, read_samples
from .sandbox import OUTCOMES

KS = (1, 5, 10, 15)


@dataclass(frozen=True)
class Report:
    """The figures of one evaluation.

    Args:
        tasks, samples: number of problems, and of completions in total.
        pass_at_k: by k, for every k of `KS` that no task has fewer samples than.
        parse_rate: share of samples whose prompt and completion together parse as Python.
        outcomes: number of samples by outcome (`sandbox.OUTCOMES`).
        distinct: share of different completions among a task's samples, mean over tasks.
        tokens: tokens generated in total.
        seconds: time of generating and executing, summed over samples.
        passed, drawn: samples that passed, and samples, by task; for `paired_bootstrap`.
    """

    tasks: int
    samples: int
    pass_at_k: dict[int, float]
    parse_rate: float
    outcomes: dict[str, int]
    distinct: float
    tokens: int
    seconds: float
    passed: dict[str, int]
    drawn: dict[str, int]

    @classmethod
    def of(cls, samples: Sequence[dict], ks: Sequence[int] = KS) -> Report:
        """The report of the samples of a `SamplesFile`.

        Raises:
            ValueError: there are no samples, or some are not judged.
        """
        if not samples:
            raise ValueError("samples is empty; there is nothing to report yet")
        if any(sample["outcome"] == UNJUDGED.outcome for sample in samples):
            raise ValueError("samples holds completions that were not executed; judge_samples executes them")
        by_task: dict[str, list[dict]] = defaultdict(list)
        for sample in samples:
            by_task[sample["task_id"]].append(sample)
        drawn = {task: len(rows) for task, rows in by_task.items()}
        passed = {task: sum(row["outcome"] == "passed" for row in rows) for task, rows in by_task.items()}
        outcomes = Counter(sample["outcome"] for sample in samples)
        return cls(
            tasks=len(by_task),
            samples=len(samples),
            pass_at_k={k: pass_at_k([*drawn.values()], [*passed.values()], k) for k in ks if k <= min(drawn.values())},
            parse_rate=sum(sample["program_parses"] for sample in samples) / len(samples),
            outcomes={name: outcomes[name] for name in OUTCOMES},
            distinct=fmean(len({row["completion"] for row in rows}) / len(rows) for rows in by_task.values()),
            tokens=sum(sample["tokens"] for sample in samples),
            seconds=sum(sample["seconds"] for sample in samples),
            passed=passed,
            drawn=drawn,
        )

    def as_dict(self) -> dict:
        """The report as JSON values."""
        return asdict(self)

    def summary(self) -> str:
        """A few lines for a terminal."""
        rates = "  ".join(f"pass@{k} {rate:.3f}" for k, rate in self.pass_at_k.items())
        outcomes = ", ".join(f"{name} {count}" for name, count in self.outcomes.items() if count)
        return (
            f"{rates}\n{self.samples} samples of {self.tasks} tasks; {self.parse_rate:.1%} parse, {self.distinct:.1%} of a "
            f"task's completions differ\noutcomes: {outcomes}\n{self.tokens} tokens ({self.tokens / self.samples:.1f} a "
            f"sample), {self.seconds:.1f} s of generating and executing"
        )


def read_report(path: str | Path, ks: Sequence[int] = KS) -> Report:
    """The report of a samples file, complete or not."""
    return Report.of(read_samples(path)[1], ks)
