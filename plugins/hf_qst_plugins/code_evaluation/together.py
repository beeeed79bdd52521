"""Evaluation of several settings at once: the fast way to compare decoders on a CPU."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tqdm.auto import tqdm

from hf_qst.tuner.config import is_count

from .problems import Problem
from .runner import judged_with, require_problems, sample_seed, settings_of
from .samples_file import UNJUDGED, SamplesFile, read_samples
from .sampling.batched import BatchedSampler, Wanted
from .sampling.completion import parses
from .sampling.on_device import DeviceSampler
from .sampling.sampler import Sampler
from .sandbox import Limits, Sandbox


def evaluate_together(
    model,
    tokenizer,
    problems: Sequence[Problem],
    settings: Mapping[str, Mapping],
    folder: str | Path,
    samples: int = 15,
    rows: int = 60,
    seed: int = 0,
    *,
    stop_strings: Sequence[str] | None = None,
    strip_prompt: bool = True,
    prefix: str = "",
    limits: Limits | None = None,
    isolation: str = "auto",
    workers: int | None = None,
    minutes: float | None = None,
    judge: bool = True,
    allow_execution: bool = False,
    progress: bool = True,
) -> bool:
    """Draw and judge `samples` completions of every problem with every setting; each setting has a file in `folder`.

    The problems are taken in their order, each with all settings, so that a run which was cut short has complete problems.
    It goes on where it stopped. Samples of the same number have the same random numbers in every setting, which makes
    paired comparisons of settings more exact. The files are those of `evaluate`; `read_report` reads them.

    Args:
        model, tokenizer, problems, seed, stop_strings, strip_prompt, prefix, workers, progress: see `evaluate`.
        settings: `generate_kwargs` of each setting by its name, which is its file's name too.
        samples: completions per problem and setting; one for a setting without sampling.
        rows: rows of the batch, see `BatchedSampler`; on a GPU `DeviceSampler`, for which some thousand are few.
        limits, isolation, allow_execution: see `Sandbox`.
        minutes: begin no further problem after this time.
        judge: whether to execute the completions. Without it nothing is executed; `judge_samples` does that later, on
            another machine if need be.

    Returns:
        Whether all samples are there.

    Raises:
        ExecutionNotAllowedError, SamplesFileError, ValueError: see `evaluate`.
    """
    began = time.monotonic()
    sandbox = Sandbox(allow_execution=allow_execution, limits=limits, isolation=isolation) if judge else None
    for name, value in (("samples", samples), ("rows", rows), ("workers", workers)):
        if not is_count(value) and (name != "workers" or value is not None):
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    require_problems(problems)
    if not settings:
        raise ValueError("settings is empty; give at least one")
    samplers = {
        name: Sampler(model, tokenizer, kwargs, stop_strings, strip_prompt, prefix) for name, kwargs in settings.items()
    }
    batched = (BatchedSampler if model.device.type == "cpu" else DeviceSampler)(samplers)
    counts = {name: samples if sampler.generate_kwargs["do_sample"] else 1 for name, sampler in samplers.items()}
    training = model.training
    model.eval()
    try:
        with contextlib.ExitStack() as stack:
            files = {}
            for name, sampler in samplers.items():
                header = settings_of(sampler, problems, counts[name], seed, sandbox, name, None)
                path = Path(folder) / f"{name}.jsonl"
                if not judge and path.exists():  # samples that are judged already stay so
                    there, _ = read_samples(path)
                    header |= {key: there[key] for key in judged_with(None)}
                files[name] = stack.enter_context(SamplesFile(path, header))
            pool = stack.enter_context(ThreadPoolExecutor(workers))
            run = _Run(batched, sandbox, pool, files, counts, seed)
            return run(problems, rows, began + 60 * minutes if minutes else float("inf"), progress)
    finally:
        model.train(training)


class _Run:
    """Draws what is missing from the files, judges and writes it."""

    def __init__(
        self, batched: BatchedSampler, sandbox: Sandbox | None, pool, files, counts: Mapping[str, int], seed: int
    ):
        self.batched, self.sandbox, self.pool, self.files, self.counts = batched, sandbox, pool, files, counts
        self.seed = seed
        self.done = {
            (sample["task_id"], name, sample["sample"]) for name, file in files.items() for sample in file.samples
        }

    def _wanted(self, problems: Sequence[Problem], until: float) -> Iterator[tuple[Problem, dict[Wanted, int]]]:
        for problem in problems:
            numbers = [(name, number) for name, count in self.counts.items() for number in range(count)]
            numbers = [one for one in numbers if (problem.task_id, *one) not in self.done]
            if numbers and time.monotonic() < until:
                yield problem, {one: sample_seed(self.seed, problem.task_id, one[1]) for one in numbers}

    def __call__(self, problems: Sequence[Problem], rows: int, until: float, progress: bool) -> bool:
        total = sum(self.counts.values()) * len(problems)
        runs: dict[tuple[str, str], Future] = {}
        started = time.perf_counter()
        waiting = []
        with tqdm(total=total, initial=len(self.done), desc="samples", unit="", disable=not progress) as bar:
            for problem, (name, number), completion, tokens in self.batched.draw(self._wanted(problems, until), rows):
                prompt = self.batched.one.prompt(problem)
                key = (problem.task_id, completion)
                if key not in runs and self.sandbox is None:
                    runs[key] = Future()
                    runs[key].set_result(UNJUDGED)
                elif key not in runs:
                    runs[key] = self.pool.submit(self.sandbox.run, problem.program(completion, prompt))
                sample = {
                    "task_id": problem.task_id,
                    "sample": number,
                    "completion": completion,
                    "program_parses": parses(prompt + completion),
                    "tokens": tokens,
                    "seconds": time.perf_counter() - started,
                }
                started = time.perf_counter()
                waiting.append((name, sample, runs[key]))
                waiting = self._write(waiting, bar, only_judged=True)
            self._write(waiting, bar, only_judged=False)
        return len(self.done) == total

    def _write(self, waiting: list[tuple[str, dict, Future]], bar, only_judged: bool) -> list:
        """Write samples; those whose programs have not ended are returned, or waited for."""
        rest = []
        for name, sample, run in waiting:
            if only_judged and not run.done():
                rest.append((name, sample, run))
                continue
            outcome = run.result()
            self.files[name].append({**sample, "outcome": outcome.outcome, "detail": outcome.detail})
            self.done.add((sample["task_id"], name, sample["sample"]))
            bar.update()
        return rest
