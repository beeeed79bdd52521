"""Sampling completions of problems from a model, executing them, and writing both down as they come."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import StoppingCriteria

from .completion import MODULE_STOPS, parses, truncate
from .problems import Problem
from .report import Report
from .samples_file import SamplesFile
from .sandbox import Limits, Sandbox

logger = logging.getLogger(__name__)

GENERATE_DEFAULTS = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 0, "max_new_tokens": 256}
"""`temperature` and `top_k` are always given: else a checkpoint's own, or transformers' top_k=50, would join in."""
MOST_WAITING = 256
"""Samples whose programs have not run yet; generation waits when there are more."""


def _continuations(tokenizer, rows: torch.Tensor, prompt_length: int) -> list[str]:
    """The text that `rows` [batch, length] add behind their prompts.

    Decoded behind the prompt's last token: SentencePiece takes the first space off a text that is decoded alone.
    """
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    anchor = len(tokenizer.decode(rows[0, prompt_length - 1 : prompt_length], **options))
    return [text[anchor:] for text in tokenizer.batch_decode(rows[:, prompt_length - 1 :], **options)]


class _Finished(StoppingCriteria):
    """Ends a row as soon as its completion would be truncated."""

    def __init__(self, tokenizer, prompt_length: int, cut):
        self.tokenizer, self.prompt_length, self.cut = tokenizer, prompt_length, cut

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        """[batch] bool, for `input_ids` [batch, length]."""
        texts = _continuations(self.tokenizer, input_ids, self.prompt_length)
        return torch.tensor([len(self.cut(text)) < len(text) for text in texts], device=input_ids.device)


class Sampler:
    """Draws completions of one problem at a time, the same ones for the same seed.

    Args:
        model, tokenizer: a causal language model and its tokenizer.
        generate_kwargs: for `model.generate`, over `GENERATE_DEFAULTS`.
        stop_strings: texts that end a completion; None for `completion.MODULE_STOPS` where a problem has no signature.
        strip_prompt: leave the whitespace at a prompt's end to the model. Many tokenizers join a line break with the
            indentation behind it; a prompt that ends in the line break alone is then one they never saw.
        prefix: text before each prompt that is no part of the program, such as a begin-of-text token.
    """

    def __init__(self, model, tokenizer, generate_kwargs=None, stop_strings=None, strip_prompt=True, prefix=""):
        self.model, self.tokenizer = model, tokenizer
        self.generate_kwargs = {**GENERATE_DEFAULTS, **(generate_kwargs or {})}
        self.stop_strings = None if stop_strings is None else tuple(stop_strings)
        self.strip_prompt, self.prefix = strip_prompt, prefix

    def prompt(self, problem: Problem) -> str:
        """The text that is completed and that begins the program."""
        return problem.prompt.rstrip() if self.strip_prompt else problem.prompt

    def encode(self, problem: Problem) -> dict[str, torch.Tensor]:
        """Ids and mask [1, length].

        Raises:
            ValueError: the prompt is empty, or with `max_new_tokens` does not fit the model's positions.
        """
        encoded = self.tokenizer(self.prefix + self.prompt(problem), return_tensors="pt")
        length, new = encoded["input_ids"].shape[1], self.generate_kwargs["max_new_tokens"]
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if length == 0:
            raise ValueError(f"the prompt of task {problem.task_id!r} has no token")
        if positions is not None and length + new > positions:
            raise ValueError(
                f"task {problem.task_id!r} has {length} prompt tokens, and with max_new_tokens={new} that is more than "
                f"the model's {positions} positions; give a max_new_tokens of at most {positions - length}"
            )
        return {name: encoded[name].to(self.model.device) for name in ("input_ids", "attention_mask")}

    def cut(self, problem: Problem, text: str) -> str:
        """`text` truncated as the problem's format asks for."""
        body = problem.entry_point is not None
        stops = self.stop_strings if self.stop_strings is not None else () if body else MODULE_STOPS
        return truncate(text, stops, body, self.prompt(problem).endswith("\n"))

    @torch.no_grad()
    def draw(self, problem: Problem, count: int, seed: int) -> list[tuple[str, int]]:
        """`count` pairs of completion and number of tokens generated for it, end-of-text included."""
        encoded = self.encode(problem)
        length = encoded["input_ids"].shape[1]
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        finished = _Finished(self.tokenizer, length, lambda text: self.cut(problem, text))
        device = self.model.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            rows = self.model.generate(
                **encoded,
                num_return_sequences=count,
                pad_token_id=pad,
                stopping_criteria=[finished],
                **self.generate_kwargs,
            )
        ends = torch.tensor(sorted({pad, self.tokenizer.eos_token_id} - {None}), device=rows.device)
        ended = torch.isin(rows[:, length:], ends).int()
        # What comes after a row's end is padding; the end itself was generated.
        used = (ended.cumsum(1) - ended == 0).sum(1).tolist()
        texts = _continuations(self.tokenizer, rows, length)
        return [(self.cut(problem, text), tokens) for text, tokens in zip(texts, used, strict=True)]


def _seed(seed: int, task_id: str, batch: int) -> int:
    """The seed of one batch of samples: it depends on nothing that ran before."""
    digest = hashlib.sha256(json.dumps([seed, task_id, batch]).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def _plain(value: object) -> object:
    """A generation argument as the header keeps it: itself if it is JSON, else the names of its classes."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__


def _name(model) -> str:
    """What the header calls the model: its path or class, and its adapters' names and methods."""
    adapters = [f"{name}={config.peft_type}" for name, config in (getattr(model, "peft_config", None) or {}).items()]
    return " + ".join([getattr(model, "name_or_path", "") or type(model).__name__, *adapters])


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
        generate_kwargs: for `model.generate`, over `GENERATE_DEFAULTS`.
        out: JSONL file to write and to resume, or None.
        batch_size: completions drawn at once, of one problem (default: all of them). Part of what the seed means.
        seed: each batch of a task is drawn with a seed made of this, the task's name and the batch's number.
        label: a name for what `generate_kwargs` cannot show in the file, such as a logits processor's settings.
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
    batch_size = batch_size or samples
    sampler = Sampler(model, tokenizer, generate_kwargs, stop_strings, strip_prompt, prefix)
    for problem in problems:
        sampler.encode(problem)
    text = json.dumps([asdict(problem) for problem in problems])
    settings = {
        "format": 1,
        "model": _name(model),
        "problems": hashlib.sha256(text.encode()).hexdigest()[:16],
        "tasks": len(problems),
        "samples": samples,
        "batch_size": batch_size,
        "seed": seed,
        "label": label,
        "generate_kwargs": {name: _plain(value) for name, value in sorted(sampler.generate_kwargs.items())},
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
