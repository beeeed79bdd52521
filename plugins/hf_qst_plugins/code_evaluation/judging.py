"""Judging of completions that were drawn without executing them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm.auto import tqdm

from .problems import Problem
from .run_settings import canonical, digest
from .runner import judged_with
from .samples_file import UNJUDGED, SamplesFileError, read_samples, rewrite_samples
from .sampling.completion import WHITESPACE, parses
from .sandbox import Limits, Sandbox


def judge_samples(
    path: str | Path,
    problems: Sequence[Problem],
    *,
    limits: Limits | None = None,
    isolation: str = "auto",
    workers: int | None = None,
    allow_execution: bool = False,
    progress: bool = True,
) -> int:
    """Execute the samples of a file of `evaluate_together(..., judge=False)` and rewrite the file with their outcomes.

    The model is not needed. Equal completions of a problem run once. A file that is judged stays as it is.

    Args:
        path: the samples file.
        problems: those that the samples were drawn for, in the same order.
        limits, isolation, allow_execution: see `Sandbox`.
        workers: programs that run at a time (default: one per processor).

    Returns:
        The number of samples that were judged.

    Raises:
        ExecutionNotAllowedError: `allow_execution` is not True.
        SamplesFileError: the file is damaged, or its samples are of other problems.
    """
    sandbox = Sandbox(allow_execution=allow_execution, limits=limits, isolation=isolation)
    settings, samples = read_samples(path)
    waiting = [sample for sample in samples if sample["outcome"] == UNJUDGED.outcome]
    if not waiting:
        return 0
    if settings["problems"] != digest(canonical([asdict(problem) for problem in problems])):
        raise SamplesFileError(f"{path}: holds samples of other problems; give those that they were drawn for")
    prompts = {
        problem.task_id: problem.prompt.rstrip(WHITESPACE) if settings["strip_prompt"] else problem.prompt
        for problem in problems
    }
    by_id = {problem.task_id: problem for problem in problems}
    different = list(dict.fromkeys((sample["task_id"], sample["completion"]) for sample in waiting))
    programs = (by_id[task].program(completion, prompts[task]) for task, completion in different)
    runs = sandbox.run_all(programs, workers)
    bar = tqdm(runs, desc=Path(path).stem, total=len(different), unit="program", disable=not progress)
    outcomes = dict(zip(different, bar, strict=True))
    for sample in waiting:
        outcome = outcomes[sample["task_id"], sample["completion"]]
        sample |= {"outcome": outcome.outcome, "detail": outcome.detail}
        sample["program_parses"] = parses(prompts[sample["task_id"]] + sample["completion"])
    rewrite_samples(path, {**settings, **judged_with(sandbox)}, samples)
    return len(waiting)
