"""Times reading a prompt and writing tokens, each several times; time a quiet machine.

hf-qst bench --model smaller --prompt_length 256 --new_tokens 64 --output_dir speed
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .arguments import Arguments
from .errors import UsageError
from .folders import require_free
from .job import Job
from .loading import model_of, plan_of_model, tokenizer_of
from .measures import pad_token_id, size
from .options import AdapterOptions, ModelOptions, OutputOptions


@dataclass
class BenchOptions:
    """What is timed.

    Args:
        prompt_length: random tokens that the model reads.
        new_tokens: tokens that it then writes, greedily and without an end.
        batch_size: rows at a time.
        repeats: timed runs, after one that is not timed.
    """

    prompt_length: int = 256
    new_tokens: int = 32
    batch_size: int = 1
    repeats: int = 5


def add_arguments(arguments: Arguments) -> None:
    arguments.add(ModelOptions)
    arguments.add(AdapterOptions)
    arguments.add(BenchOptions)
    arguments.add(OutputOptions)
    arguments.flag("overwrite", "Replace what is in --output_dir.")


def prepare(options) -> Job:
    require_free(options.output_dir, options.overwrite, required=False)
    for name in ("prompt_length", "new_tokens", "batch_size", "repeats"):
        if getattr(options, name) < 1:
            raise UsageError(name, f"it must be at least 1, got {getattr(options, name)}")
    tokenizer = tokenizer_of(options)

    def work(record) -> None:
        model = model_of(options, options.adapter)
        record.content["before"] = {**size(model), "perplexity": {}, "completions": []}
        record.content["speed"] = speed(model, options, pad_token_id(tokenizer))
        for name, figures in record.content["speed"].items():
            print(f"{name}: {figures['tokens_per_second']:.1f} tokens/s, median of {len(figures['seconds'])}")

    def plan():
        return [plan_of_model(options), f"times: {options.prompt_length} tokens in, {options.new_tokens} out"]

    return Job(plan, work, options.output_dir)


@torch.no_grad()
def speed(model, options, pad: int) -> dict:
    """Seconds of each run and median tokens per second, for reading a prompt and for writing tokens after it."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (options.batch_size, options.prompt_length), generator=generator).to(model.device)
    length = {"min_new_tokens": options.new_tokens, "max_new_tokens": options.new_tokens, "do_sample": False}
    mask = torch.ones_like(ids)
    reading = _times(lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1), options.repeats)
    both = _times(
        lambda: model.generate(input_ids=ids, attention_mask=mask, pad_token_id=pad, **length), options.repeats
    )
    # The prompt is read in the second one too.
    read = statistics.median(reading)
    writing = [max(seconds - read, 1e-9) for seconds in both]
    return {
        "reading": _figures(reading, options.batch_size * options.prompt_length),
        "writing": _figures(writing, options.batch_size * options.new_tokens),
    }


def _times(call: Callable, repeats: int) -> list[float]:
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def _figures(seconds: list[float], tokens: int) -> dict:
    return {"seconds": seconds, "tokens_per_second": tokens / statistics.median(seconds)}
