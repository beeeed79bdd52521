"""What the samples of an evaluation say, as figures and as a table."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .pass_at_k import pass_at_k
from .samples_file import read_samples
from .sandbox import OUTCOMES

KS = (1, 5, 10, 15)


@dataclass(frozen=True)
class Report:
    """The figures of one evaluation.

    Args:
        tasks, samples: problems, and completions drawn of all of them together.
        pass_at_k: by k, those of `KS` that every task has samples for.
        parse_rate: share of samples whose prompt and completion together are Python (`ast.parse`).
        outcomes: samples by how their program ended, every one of `sandbox.OUTCOMES`.
        distinct: mean over tasks of the share of different completions among a task's samples.
        tokens: generated, all samples together.
        seconds: of generating and executing, summed over samples.
        passed, drawn: samples that passed, and all, by task; for `paired_bootstrap`.
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
        """From the samples of a `SamplesFile`.

        Raises:
            ValueError: there is no sample.
        """
        if not samples:
            raise ValueError("samples is empty; there is nothing to report yet")
        by_task: dict[str, list[dict]] = defaultdict(list)
        for sample in samples:
            by_task[sample["task_id"]].append(sample)
        drawn = {task: len(rows) for task, rows in by_task.items()}
        passed = {task: sum(row["outcome"] == "passed" for row in rows) for task, rows in by_task.items()}
        outcomes = Counter(sample["outcome"] for sample in samples)
        return cls(
            tasks=len(by_task),
            samples=len(samples),
            pass_at_k={
                k: pass_at_k(list(drawn.values()), list(passed.values()), k) for k in ks if k <= min(drawn.values())
            },
            parse_rate=sum(sample["program_parses"] for sample in samples) / len(samples),
            outcomes={name: outcomes[name] for name in OUTCOMES},
            distinct=sum(len({row["completion"] for row in rows}) / len(rows) for rows in by_task.values())
            / len(by_task),
            tokens=sum(sample["tokens"] for sample in samples),
            seconds=sum(sample["seconds"] for sample in samples),
            passed=passed,
            drawn=drawn,
        )

    def as_dict(self) -> dict:
        """For JSON."""
        return asdict(self)

    def summary(self) -> str:
        """A few lines for a terminal."""
        rates = "  ".join(f"pass@{k} {rate:.3f}" for k, rate in self.pass_at_k.items())
        outcomes = ", ".join(f"{name} {count}" for name, count in self.outcomes.items() if count)
        return "\n".join(
            (
                rates,
                f"{self.samples} samples of {self.tasks} tasks; {self.parse_rate:.1%} parse, {self.distinct:.1%} of a "
                "task's completions differ",
                f"outcomes: {outcomes}",
                f"{self.tokens} tokens ({self.tokens / self.samples:.1f} a sample), {self.seconds:.1f} s "
                "of generating and executing",
            )
        )


def read_report(path: str | Path, ks: Sequence[int] = KS) -> Report:
    """The report of a file of samples, finished or not."""
    return Report.of(read_samples(path)[1], ks)
