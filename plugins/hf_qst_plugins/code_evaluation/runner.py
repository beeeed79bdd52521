"""One evaluation: completions are drawn, executed and written to a file as they come."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from tqdm.auto import tqdm

from hf_qst.tuner.config import is_count

from .problems import Problem
from .report import Report
from .run_settings import canonical, described, digest, model_settings
from .samples_file import SamplesFile
from .sampling.completion import parses
from .sampling.sampler import Sampler
from .sandbox import Limits, Sandbox

logger = logging.getLogger(__name__)

MOST_WAITING = 256
"""The most samples whose programs have not run yet; beyond that, generation waits."""


def sample_seed(seed: int, task_id: str, batch: int) -> int:
    """The seed of one batch, or of one sample. It does not depend on earlier ones."""
    hashed = hashlib.sha256(json.dumps([seed, task_id, batch]).encode()).digest()
    return int.from_bytes(hashed[:7], "big")


def require_problems(problems: Sequence[Problem]) -> None:
    """Refuse an empty list of problems, and one in which a `task_id` is there twice."""
    if not problems:
        raise ValueError("problems is empty; give at least one")
    counts = Counter(str(problem.task_id) for problem in problems)
    if repeated := [task for task, count in counts.items() if count > 1]:
        raise ValueError(
            f"problems holds the task_id {repeated[0]!r} {counts[repeated[0]]} times, and {len(repeated) - 1} others more "
            "than once; samples are counted by it, so give each problem its own"
        )


def settings_of(
    sampler: Sampler,
    problems: Sequence[Problem],
    samples: int,
    seed: int,
    sandbox: Sandbox | None,
    label: str,
    batch_size: int | None,
) -> dict:
    """The header of a samples file. `batch_size` None: each sample has random numbers of its own; `sandbox` None: the
    samples are not judged.

    Raises:
        ValueError: a prompt that does not fit the model.
    """
    prompts = [sampler.encode(problem)["input_ids"].tolist() for problem in problems]
    return {
        "format": 2,
        "model": model_settings(sampler.model),
        "problems": digest(canonical([asdict(problem) for problem in problems])),
        "prompt_tokens": digest(canonical(prompts)),
        "tasks": len(problems),
        "samples": samples,
        "batch_size": batch_size,
        "seed": seed,
        "label": label,
        "generate_kwargs": described(sampler.generate_kwargs),
        "pad_and_end_tokens": [sampler.pad, sampler.ends],
        "stop_strings": sampler.stop_strings,
        "strip_prompt": sampler.strip_prompt,
        "prefix": sampler.prefix,
        **judged_with(sandbox),
    }


def judged_with(sandbox: Sandbox | None) -> dict:
    """What a header says of the judging; None where there was none."""
    if sandbox is None:
        return {"limits": None, "isolation": None}
    return {"limits": asdict(sandbox.limits), "isolation": sandbox.isolation}


def evaluate(
    model,
    tokenizer,
    problems: Sequence[Problem],
    samples: int = 15,
    generate_kwargs: Mapping | None = None,
    out: str | Path | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    *,
    label: str = "",
    stop_strings: Sequence[str] | None = None,
    strip_prompt: bool = True,
    prefix: str = "",
    limits: Limits | None = None,
    isolation: str = "auto",
    workers: int | None = None,
    overwrite: bool = False,
    allow_execution: bool = False,
    progress: bool = True,
) -> Report:
    """Draw `samples` completions of every problem, execute each with the problem's tests, and report.

    With `out`, every sample is written as a JSON line as soon as it is judged, and an interrupted run continues with the
    samples it would have drawn. Equal completions of one task run once.

    Args:
        model, tokenizer: a causal language model and its tokenizer; the model is put in eval mode for the run.
        problems: from `read_problems`.
        samples: completions per problem.
        generate_kwargs: arguments of `model.generate`; see `Sampler`.
        out: JSONL file to write or to resume.
        batch_size: completions of one problem drawn at once (default: all). Other batch sizes give other samples.
        seed: each batch's seed is derived from this, the `task_id` and the batch's number.
        label: a note in the file for what the settings cannot show, such as a patched library.
        stop_strings, strip_prompt, prefix: see `Sampler`.
        limits, isolation, allow_execution: see `Sandbox`.
        workers: programs that run at a time (default: one per processor).
        overwrite: discard the samples in `out`.
        progress: whether to show a progress bar.

    Raises:
        ExecutionNotAllowedError: `allow_execution` is not True.
        SamplesFileError: `out` holds samples of another run, is damaged, or in use.
        ValueError: an argument out of range, or a prompt that does not fit the model; raised before anything is drawn.
    """
    sandbox = Sandbox(allow_execution=allow_execution, limits=limits, isolation=isolation)
    for name, value in (("samples", samples), ("batch_size", batch_size), ("workers", workers)):
        if not is_count(value) and (name == "samples" or value is not None):
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    require_problems(problems)
    batch_size = batch_size or samples
    sampler = Sampler(model, tokenizer, generate_kwargs, stop_strings, strip_prompt, prefix)
    settings = settings_of(sampler, problems, samples, seed, sandbox, label, batch_size)
    training = model.training
    model.eval()
    try:
        samples_file = _InMemory() if out is None else SamplesFile(out, settings, overwrite)
        with ThreadPoolExecutor(workers) as pool, samples_file as file:
            return Report.of(_run(sampler, sandbox, pool, problems, settings, file, progress))
    finally:
        model.train(training)


class _InMemory(contextlib.nullcontext):
    """Samples of a run without a file."""

    def __init__(self):
        super().__init__(self)
        self.samples: list[dict] = []

    def append(self, sample: dict) -> None:
        self.samples.append(sample)


def _run(sampler, sandbox, pool, problems, settings, file, progress) -> list[dict]:
    """Generate batch by batch while programs run, and write the samples in order."""
    done = {(sample["task_id"], sample["sample"]) for sample in file.samples}
    if done:
        logger.info("%d of %d samples are in the file", len(done), settings["samples"] * len(problems))
    waiting: deque = deque()
    bar = tqdm(
        total=settings["samples"] * len(problems), initial=len(done), desc="samples", unit="", disable=not progress
    )

    def write_oldest() -> None:
        sample, run, first = waiting.popleft()
        outcome = run.result()
        sample |= {"outcome": outcome.outcome, "detail": outcome.detail}
        sample["seconds"] += outcome.seconds if first else 0.0
        file.append(sample)
        bar.update()

    with bar:
        for problem in problems:
            runs: dict[str, object] = {}
            for start in range(0, settings["samples"], settings["batch_size"]):
                numbers = range(start, min(start + settings["batch_size"], settings["samples"]))
                if all((problem.task_id, number) in done for number in numbers):
                    continue
                started = time.perf_counter()
                drawn = sampler.draw(problem, len(numbers), sample_seed(settings["seed"], problem.task_id, start))
                seconds = (time.perf_counter() - started) / len(numbers)
                for number, (completion, tokens) in zip(numbers, drawn, strict=True):
                    if (problem.task_id, number) in done:
                        continue
                    prompt = sampler.prompt(problem)
                    first = completion not in runs
                    if first:
                        runs[completion] = pool.submit(sandbox.run, problem.program(completion, prompt))
                    sample = {
                        "task_id": problem.task_id,
                        "sample": number,
                        "completion": completion,
                        "program_parses": parses(prompt + completion),
                        "tokens": tokens,
                        "seconds": seconds,
                    }
                    waiting.append((sample, runs[completion], first))
                while waiting and (waiting[0][1].done() or len(waiting) > MOST_WAITING):
                    write_oldest()
        while waiting:
            write_oldest()
    return file.samples
