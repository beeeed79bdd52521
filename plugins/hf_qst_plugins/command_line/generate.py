"""Prints the completions; with `--output_dir` also writes them with a report, in which hot tokens are marked.

hf-qst generate --model smollm2 --prompts 'def mean(values):' --adaptive_temperature --adaptive.preset humaneval
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from .arguments import Arguments
from .errors import UsageError
from .folders import require_free
from .job import Job
from .loading import model_of, plan_of_model, tokenizer_of
from .measures import pad_token_id, prompts_of, size
from .options import AdapterOptions, ModelOptions, OutputOptions
from .sampling import add_sampling, generate_arguments, processor_of, temperatures


@dataclass
class PromptOptions:
    """What is completed.

    Args:
        prompts: a text, or a list of them.
        prompts_file: a UTF-8 file whose whole text is one more prompt.
        chat: each prompt is a user's turn, rendered by the tokenizer's chat template.
        samples: completions of each prompt.
        seed: of the random numbers.
    """

    prompts: str | list[str] = field(default_factory=list)
    prompts_file: str | None = None
    chat: bool = False
    samples: int = 1
    seed: int = 0


def add_arguments(arguments: Arguments) -> None:
    arguments.add(ModelOptions)
    arguments.add(AdapterOptions)
    arguments.add(PromptOptions)
    add_sampling(arguments)
    arguments.add(OutputOptions)
    arguments.flag("overwrite", "Replace what is in --output_dir.")


def prepare(options) -> Job:
    require_free(options.output_dir, options.overwrite, required=False)
    prompts = _prompts(options)
    tokenizer = tokenizer_of(options)
    if options.chat and not tokenizer.chat_template:
        raise UsageError("chat", f"the tokenizer of {options.model!r} has no chat template")
    processor = processor_of(options, tokenizer)
    arguments = generate_arguments(options, processor)

    def work(record) -> None:
        from transformers import set_seed

        model = model_of(options, options.adapter)
        record.content["before"] = {**size(model), "perplexity": {}, "completions": []}
        for prompt in prompts:
            set_seed(options.seed)
            for row in _completions(model, tokenizer, prompt, options, arguments, processor):
                record.content["before"]["completions"].append(row)
                print(f"{prompt}\n{row['text']}\n" if options.chat else f"{prompt}{row['text']}\n", flush=True)

    def plan():
        return [plan_of_model(options), f"completes: {len(prompts)} prompts, {options.samples} times each"]

    return Job(plan, work, options.output_dir)


def _prompts(options) -> list[str]:
    prompts = prompts_of(options)
    if options.prompts_file is not None:
        try:
            prompts.append(Path(options.prompts_file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError("prompts_file", error) from error
    if not prompts:
        raise UsageError("prompts", "it must be given, or --prompts_file")
    return prompts


def _completions(model, tokenizer, prompt: str, options, arguments: dict, processor) -> list[dict]:
    """The completions of one prompt, JSON-ready, with the temperature of every token where it changes."""
    text = prompt
    if options.chat:
        turn = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    special = not options.chat  # a template has its own
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=special, return_token_type_ids=False)
    length, started = inputs["input_ids"].shape[1], time.perf_counter()
    several = {"num_return_sequences": options.samples} if arguments["do_sample"] else {}
    ids = model.generate(**inputs.to(model.device), **arguments, **several, pad_token_id=pad_token_id(tokenizer)).cpu()
    seconds = time.perf_counter() - started
    rows = []
    for row in ids:
        new = row[length:]
        end = (new == tokenizer.eos_token_id).nonzero()
        row = row[: length + int(end[0])] if len(end) else row
        new = row[length:]
        found = {
            "prompt": prompt,
            "text": tokenizer.decode(new, skip_special_tokens=True),
            "tokens": len(new),
            "tokens_per_second": round(ids.shape[0] * (ids.shape[1] - length) / seconds, 2),
        }
        if processor is not None:
            found["pieces"] = [tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in new.tolist()]
            found["temperatures"] = [round(value, 4) for value in temperatures(processor, row, length)]
        rows.append(found)
    return rows
