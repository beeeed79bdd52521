"""Measures the project's base model and writes its card; `examples.train_base --export-only` calls both."""

import math
import os
import platform
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig

from examples.corpus import blocks, held_out_loss, split, stdlib_files, tokens, transformers_files
from examples.ngram import KneserNey

END_OF_TEXT = "<|endoftext|>"
PROMPTS = (
    "def read_lines(path):",
    "class Stack:",
    "import unittest\n\n\nclass TestQueue(unittest.TestCase):",
)
"""No prompt ends in a blank: a line break is one token with the indentation after it, so a prompt that ends in one says
that the next line is not indented."""


@torch.no_grad()
def sample(model, tokenizer, prompt: str, new_tokens: int = 160, seed: int = 0) -> str:
    """`prompt`, as the start of a file, and what the model makes of it: temperature 0.7, the likeliest 95 %."""
    torch.manual_seed(seed)
    inputs = tokenizer(END_OF_TEXT + prompt, return_tensors="pt").to(model.device)
    made = model.generate(
        **inputs,
        max_new_tokens=new_tokens,
        do_sample=True,
        temperature=0.7,
        top_p=0.95,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(made[0], skip_special_tokens=True)


def evaluate(model, tokenizer, settings: dict, limit: int = 400, check_rows: int = 16) -> dict:
    """The figures of the model card: losses of the model and of a 5-gram on the same held-out tokens, and samples.

    `limit` is the number of blocks taken of each corpus, evenly spaced; `check_rows` that of the short check the tests
    repeat.
    """
    length = settings["seq"]
    files, held_files = split(stdlib_files(), settings["held_out"])
    if settings["max_files"]:
        files, held_files = files[: settings["max_files"]], held_files[: max(1, settings["max_files"] // 10)]
    ids = tokens(files, tokenizer)
    gram = KneserNey(ids, len(tokenizer), order=5)
    results: dict = {"python": platform.python_version(), "train_files": len(files), "train_tokens": len(ids)}
    results["block_length"] = length
    other = split(transformers_files(), settings["held_out"])[1]
    for name, part in (("stdlib", held_files), ("transformers", other[: settings["max_files"]])):
        held = tokens(part, tokenizer)
        rows = blocks(held, length)
        chosen = blocks(np.arange(len(rows) * length), length, limit)[:, 0].numpy() // length
        loss = held_out_loss(model, rows[chosen])
        per_token = sum(len(f.text.encode()) for f in part) / len(held)
        results[name] = {
            "files": len(part),
            "tokens": len(held),
            "blocks": len(chosen),
            "loss": loss,
            "perplexity": math.exp(loss),
            "bytes_per_token": per_token,
            "bits_per_byte": loss / math.log(2) / per_token,
            "ngram_loss": gram.loss(held, length, chosen),
        }
    held = blocks(tokens(held_files, tokenizer), length, check_rows)
    results["check"] = {"blocks": len(held), "loss": held_out_loss(model, held)}
    results["samples"] = [sample(model, tokenizer, prompt) for prompt in PROMPTS]
    return results


CARD = """\
---
license: other
license_name: psf-2.0
license_link: https://docs.python.org/3/license.html
library_name: transformers
pipeline_tag: text-generation
language: code
---

# A small base model of Python source

A causal language model with the Llama architecture, trained from nothing on the source of the Python standard library.
It is small enough to ship beside the code and good enough that a change to it, quantization or fine-tuning, shows in
its loss. `examples/train_base.py` made it and wrote this card from what it measured.

| | |
|---|---|
| parameters | {parameters:,} |
| shape | {layers} layers, width {hidden}, {heads} heads over {kv_heads} key-value heads, embeddings tied |
| file | `model.safetensors`, bfloat16, {bytes:,} bytes |
| tokenizer | byte-level BPE, {vocab:,} tokens, {bytes_per_token:.2f} bytes of held-out source per token |
| context | {positions} tokens |

## Data

The `.py` files of the standard library of Python {python}, its tests included, split by file by a hash of the name
(`examples/corpus.py`). The library is under the [PSF licence](https://docs.python.org/3/license.html). The source of
`transformers` {transformers}, measured below, was never trained on.

| | files | tokens |
|---|---:|---:|
| trained on | {train_files:,} | {train_tokens:,} |
| held out | {held_files:,} | {held_tokens:,} |

## Training

| | |
|---|---|
| steps | {steps:,} of {batch} windows of {seq} tokens |
| tokens seen | {tokens:,}, or {epochs:.2f} passes over the data |
| time | {minutes:.0f} minutes on one {machine}, {speed:,.0f} tokens a second |
| precision | matrix products in {precision}, weights in float32 |
| optimizer | {optimizer}; learning rate up over the first {warmup:.0%} of the schedule, then down to 0 |
| last training loss | {train_loss:.3f} |

    {command}

## Held-out loss

Nats per token over blocks of {seq} tokens, every token but the first predicted from those before it in the block, by
the weights as shipped, computed in float32. The 5-gram is an interpolated modified Kneser-Ney model counted from the
same training tokens, measured on the same held-out tokens. Bits per byte do not depend on the tokenizer.

| held out | files | blocks | loss | perplexity | bits per byte | 5-gram's loss |
|---|---:|---:|---:|---:|---:|---:|
{table}

## Samples

Three prompts, each as the start of a file, drawn once at temperature 0.7 and top-p 0.95 with seed 0, as they came and
cut at 160 tokens:

{samples}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("examples/base_model")
tokenizer = AutoTokenizer.from_pretrained("examples/base_model")
```

A prompt that starts a file goes after `<|endoftext|>`, which the tokenizer does not add by itself; a prompt without it
reads as a piece from anywhere in one, at any indentation. End a prompt before a blank or a line break, not after: a line
break is one token with the indentation that follows, and a word with the blank before it.

## Limits

It has seen one library. It writes what looks like Python, not what works: names, calls and arithmetic are made up, and
its code must not be run unread. Its English is that of docstrings and comments. Like any model trained on few files, it
can repeat passages of them. Files of one library resemble each other, the held-out ones too; for text without relatives
in the training data look at the loss on `transformers`. Positions after {positions} were never trained.
"""


def machine_name(device: str) -> str:
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)} GPU"
    return f"{os.cpu_count()}-core {platform.machine().replace('_', '-')} CPU"


def card(out: Path, config: LlamaConfig, state: dict, results: dict) -> str:
    """The text of the model card, every figure from `state` (the run) and `results` (`evaluate`)."""
    table = "\n".join(
        f"| {label} | {r['files']} | {r['blocks']} | {r['loss']:.3f} | {r['perplexity']:.2f} "
        f"| {r['bits_per_byte']:.3f} | {r['ngram_loss']:.3f} |"
        for label, r in (("standard library", results["stdlib"]), ("`transformers`", results["transformers"]))
    )
    settings = state["settings"]
    measured = ("python", "train_files", "train_tokens", "parameters")
    command = state["command"]
    if settings["resume"]:  # the continuation as it was started last: it may have moved the end of the schedule
        again = [f"--{k}={settings[k]}" for k in ("minutes", "steps", "threads") if settings[k]]
        again += ["--compile"] * settings["compile"]
        command += f"\n    python -m examples.train_base --run {settings['run']} --resume {' '.join(again)}"
    if "--out" not in command:
        command += f"\n    python -m examples.train_base --run {settings['run']} --export-only {out}"
    return CARD.format(
        **{k: settings[k] for k in ("batch", "seq", "precision", "warmup")},
        **{k: results[k] for k in measured},
        transformers=results["transformers_version"],
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        vocab=config.vocab_size,
        positions=config.max_position_embeddings,
        bytes=(out / "model.safetensors").stat().st_size,
        bytes_per_token=results["stdlib"]["bytes_per_token"],
        held_files=results["stdlib"]["files"],
        held_tokens=results["stdlib"]["tokens"],
        steps=state["step"],
        tokens=state["tokens"],
        epochs=state["tokens"] / results["train_tokens"],
        minutes=state["elapsed"] / 60,
        optimizer={"muon": "Muon for the matrices and AdamW for the rest", "adamw": "AdamW"}[settings["optimizer"]],
        train_loss=state["log"][-1]["train_loss"],
        command=command,
        machine=state["machine"],
        speed=state["tokens"] / state["elapsed"],
        table=table,
        samples="\n\n".join(f"```python\n{text.rstrip()}\n```" for text in results["samples"]),
    )
