"""What is measured of a model, before and after: size by layer, perplexity, completions, speed."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from hf_qst.base_model import dense_shape, stored_bytes
from hf_qst.base_model.linear_layers import is_linear
from hf_qst.mixed_rank import rank_report
from hf_qst_plugins.inputs import held_out_loss

# Names that PEFT, tuner layers and pruned branches put around a base model's own.
_WRAPPERS = re.compile(r"(^base_model\.model\.)|((?<=\.)base_layer\.)|((?<=\.)module\.)")


def measure(model: nn.Module, tokenizer, texts: Mapping[str, Sequence], options) -> dict:
    """Size, perplexity on each of `texts` and completions of a model, JSON-ready.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        texts: rows by name.
        options: with `evaluation_batch_size`, `prompts` and `max_new_tokens`.
    """
    return {
        **size(model),
        "perplexity": {name: perplexity(model, rows, options.evaluation_batch_size) for name, rows in texts.items()},
        "completions": [complete(model, tokenizer, prompt, options.max_new_tokens) for prompt in prompts_of(options)],
    }


def prompts_of(options) -> list[str]:
    """The texts of `--prompts`."""
    return [options.prompts] if isinstance(options.prompts, str) else list(options.prompts)


def size(model: nn.Module) -> dict:
    """Class, parameters and bytes of a model, in total and by layer, and its linear layers."""
    layers = by_layer(model)
    return {
        "class": type(getattr(model, "base_model", model)).__name__
        if hasattr(model, "peft_config")
        else type(model).__name__,
        "parameters": sum(row["parameters"] for row in layers),
        "bytes": sum(row["bytes"] for row in layers),
        "layers": layers,
        "linear_layers": [{**row, "name": _WRAPPERS.sub("", row["name"])} for row in rank_report(model)],
    }


def by_layer(model: nn.Module) -> list[dict]:
    """Parameters and bytes of each block, and of each part outside the blocks; shared weights count once.

    Quantised weights count with their number of values, and bytes include the scales.
    """
    rows: dict[str, dict] = {}
    seen: set[int] = set()
    prefix = getattr(model.base_model, "prefix", None) if hasattr(model, "peft_config") else None
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        if not own:
            continue
        seen |= {id(p) for p in own}
        row = rows.setdefault(_layer_of(_WRAPPERS.sub("", name), prefix), {"parameters": 0, "bytes": 0})
        row["parameters"] += sum(_values(module, p) for p in own)
        row["bytes"] += stored_bytes(module) - sum(stored_bytes(child) for child in module.children())
    return [{"name": name, **row} for name, row in rows.items()]


def _layer_of(name: str, prefix: str | None) -> str:
    """A module's block, the part of an adapter's own network that it is in, or itself."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
        if prefix and part.startswith(prefix):
            return ".".join(parts[: i + 3])
    return name


def _values(module: nn.Module, parameter: nn.Parameter) -> int:
    if is_linear(module) and parameter is module.weight:
        return math.prod(dense_shape(module))
    return parameter.numel()


def perplexity(model: nn.Module, rows: Sequence, batch_size: int) -> dict:
    """Loss in nats per token, perplexity, tokens, and tokens per second of scoring them."""
    started = time.perf_counter()
    loss = held_out_loss(model, rows, batch_size)
    seconds = time.perf_counter() - started
    tokens = sum(len(row["input_ids"]) for row in rows)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "rows": len(rows),
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1),
    }


@torch.no_grad()
def complete(model: nn.Module, tokenizer, prompt: str, length: int) -> dict:
    """A greedy completion: prompt, text, tokens, and tokens per second."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    training = model.training
    started = time.perf_counter()
    ids = model.eval().generate(**inputs, max_new_tokens=length, do_sample=False, pad_token_id=pad_token_id(tokenizer))
    model.train(training)
    new = ids[0, inputs["input_ids"].shape[1] :]
    return {
        "prompt": prompt,
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "tokens": len(new),
        "tokens_per_second": round(len(new) / (time.perf_counter() - started), 2),
    }


def pad_token_id(tokenizer) -> int:
    """The id that fills rows; the end-of-text token's where a tokenizer has none of its own."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
