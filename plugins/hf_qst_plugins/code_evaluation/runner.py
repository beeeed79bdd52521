"""An evaluation: completions are drawn, executed and written down as they come."""

from __future__ import annotations

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

from .completion import parses
from .problems import Problem
from .report import Report
from .run_settings import canonical, described, digest, model_settings
from .sampler import Sampler
from .samples_file import SamplesFile
from .sandbox import Limits, Sandbox

logger = logging.getLogger(__name__)

MOST_WAITING = 256
"""Samples whose programs have not run yet; generation waits when there are more."""


def _seed(seed: int, task_id: str, batch: int) -> int:
    """The seed of one batch of samples: it depends on nothing that ran before."""
    hashed = hashlib.sha256(json.dumps([seed, task_id, batch]).encode()).digest()
    return int.from_bytes(hashed[:7], "big")


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
    """Draw `samples` completions of every problem, execute them with the problem's tests, and report.

    With `out` every sample is written as a JSON line as soon as it is judged, and a run that was cut short goes on where
    it stopped, with the samples it would have drawn. Programs that occur twice among a task's samples run once.

    Args:
        model, tokenizer: a causal language model and its tokenizer; the model is put in eval mode for the run.
        problems: from `read_problems`.
        samples: completions a problem.
        generate_kwargs: for `model.generate`, over the values of a `generation_config` among them, over
            `GENERATE_DEFAULTS`.
        out: JSONL file to write and to resume, or None.
        batch_size: completions drawn at once, of one problem (default: all of them). Part of what the seed means.
        seed: each batch of a task is drawn with a seed made of this, the task's name and the batch's number.
        label: a name for what the settings cannot show in the file, such as a patched library.
        stop_strings, strip_prompt, prefix: as in `Sampler`.
        limits, isolation, allow_execution: as in `Sandbox`.
        workers: programs executed at a time (default: one a processor).
        overwrite: start anew where `out` exists.
        progress: show a bar.

    Raises:
        ExecutionNotAllowedError: `allow_execution` is not True.
        SamplesFileError: `out` holds another run's samples, is damaged, or in use.
        ValueError: an argument out of its range, or a prompt that does not fit the model; before anything is drawn.
    """
    sandbox = Sandbox(allow_execution=allow_execution, limits=limits, isolation=isolation)
    for name, value in (("samples", samples), ("batch_size", batch_size), ("workers", workers)):
        optional = name != "samples" and value is None
        if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    if not problems:
        raise ValueError("problems is empty; give at least one")
    counts = Counter(str(problem.task_id) for problem in problems)
    twice = [task for task, count in counts.items() if count > 1]
    if twice:
        raise ValueError(
            f"problems holds the task_id {twice[0]!r} {counts[twice[0]]} times, and {len(twice) - 1} others more than "
            "once; samples are counted by it, so give each problem its own"
        )
    batch_size = batch_size or samples
    sampler = Sampler(model, tokenizer, generate_kwargs, stop_strings, strip_prompt, prefix)
    prompts = [sampler.encode(problem)["input_ids"].tolist() for problem in problems]
    settings = {
        "format": 2,
        "model": model_settings(model),
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
        "strip_prompt": strip_prompt,
        "prefix": prefix,
        "limits": asdict(sandbox.limits),
        "isolation": sandbox.isolation,
    }
    training = model.training
    model.eval()
    try:
        with ThreadPoolExecutor(workers) as pool:
            if out is None:
                return Report.of(_run(sampler, sandbox, pool, problems, settings, _InMemory(), progress))
            with SamplesFile(out, settings, overwrite) as file:
                return Report.of(_run(sampler, sandbox, pool, problems, settings, file, progress))
    finally:
        model.train(training)


class _InMemory:
    """Samples of a run that is not written down."""

    def __init__(self):
        self.samples: list[dict] = []

    def append(self, sample: dict) -> None:
        self.samples.append(sample)


def _run(sampler, sandbox, pool, problems, settings, file, progress) -> list[dict]:
    """Generate batch after batch; programs run meanwhile, and their samples are written in order."""
    done = {(sample["task_id"], sample["sample"]) for sample in file.samples}
    if done:
        logger.info("%d of %d samples were there", len(done), settings["samples"] * len(problems))
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
                drawn = sampler.draw(problem, len(numbers), _seed(settings["seed"], problem.task_id, start))
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
