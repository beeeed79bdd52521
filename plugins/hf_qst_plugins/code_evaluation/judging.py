"""Judging of completions that were drawn without executing them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm.auto import tqdm

from .problems import Problem
from .run_settings import canonical, digest
from .runner import judged_with
from .samples_file import UNJUDGED, SamplesFileError, read_samples, rewrite_samples
from .sampling.completion import WHITESPACE, parses
from .sandbox import Limits, Outcome, Sandbox


def judge_samples(
    paths: Iterable[str | Path],
    problems: Sequence[Problem],
    *,
    limits: Limits | None = None,
    isolation: str = "auto",
    workers: int | None = None,
    allow_execution: bool = False,
    progress: bool = True,
) -> int:
    """Execute the samples of files of `evaluate_together(..., judge=False)`; each file is rewritten with their outcomes.

    The model is not needed. Equal completions of a problem run once for all files. A file that is judged stays as it is.

    Args:
        paths: the samples files.
        problems: those that the samples were drawn for, in the same order.
        limits, isolation, allow_execution: see `Sandbox`.
        workers: programs that run at a time (default: one per processor).

    Returns:
        The number of samples that were judged.

    Raises:
        ExecutionNotAllowedError: `allow_execution` is not True.
        SamplesFileError: a file is damaged, or its samples are of other problems.
    """
    sandbox = Sandbox(allow_execution=allow_execution, limits=limits, isolation=isolation)
    by_id = {problem.task_id: problem for problem in problems}
    outcomes: dict[tuple[str, str, str], Outcome] = {}
    judged = 0
    for path in paths:
        settings, samples = read_samples(path)
        waiting = [sample for sample in samples if sample["outcome"] == UNJUDGED.outcome]
        if not waiting:
            continue
        if settings["problems"] != digest(canonical([asdict(problem) for problem in problems])):
            raise SamplesFileError(f"{path}: holds samples of other problems; give those that they were drawn for")

        if settings["isolation"] is not None and any(
            settings[key] != value for key, value in judged_with(sandbox).items()
        ):
            raise SamplesFileError(f"{path}: holds samples judged with other limits or isolation; give the same")

        def run_of(sample: dict, strip: bool = settings["strip_prompt"]) -> tuple[str, str, str]:
            """Task, prompt and completion."""
            prompt = by_id[sample["task_id"]].prompt
            return sample["task_id"], prompt.rstrip(WHITESPACE) if strip else prompt, sample["completion"]

        new = list(dict.fromkeys(run for run in map(run_of, waiting) if run not in outcomes))
        programs = (by_id[task].program(completion, prompt) for task, prompt, completion in new)
        runs = sandbox.run_all(programs, workers)
        bar = tqdm(runs, desc=Path(path).stem, total=len(new), unit="program", disable=not progress)
        outcomes |= zip(new, bar, strict=True)
        for sample in waiting:
            _, prompt, completion = run = run_of(sample)
            sample |= {"outcome": outcomes[run].outcome, "detail": outcomes[run].detail}
            sample["program_parses"] = parses(prompt + completion)
        rewrite_samples(path, {**settings, **judged_with(sandbox)}, samples)
        judged += len(waiting)
    return judged
