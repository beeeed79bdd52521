"""The language model's rows of the compression benchmark: perplexity by method and part kept, and 4 bits with residuals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common.parts import fill
from benchmarks.compression.methods import UNIFORM, compressed, parameters, target_shapes
from examples.corpus import SourceFile, blocks, held_out_loss, split, stdlib_files, tokens, transformers_files
from examples.demo import nf4
from hf_qst import MixedRankConfig

LENGTH = 512
# Blocks behind one of the losses that are kept, so that two methods can be compared text by text.
PART = 4
BATCH = 8
# What a result file says of the project's base, wherever the checkout lies.
BASE_NAME = "examples/base_model"


@dataclass
class Text:
    """Calibration batches, and held-out blocks [n, length] of three kinds.

    The base was trained on the standard library and its files calibrate it. `stdlib` are files that neither saw,
    `transformers` is Python of another kind, `prose` is the English of Python's language reference.
    """

    calibration: list[dict]
    held: dict[str, torch.Tensor]


def prose() -> list[SourceFile]:
    """The text behind `help("topics")`, which every Python has and the base was not trained on."""
    from pydoc_data.topics import topics

    return [SourceFile(name, topics[name]) for name in sorted(topics)]


def load_text(model: str | Path, calibration_blocks: int, held_blocks: int) -> Text:
    tokenizer = AutoTokenizer.from_pretrained(model)
    training, held = split(stdlib_files())
    kinds = {"stdlib": held, "transformers": split(transformers_files())[1], "prose": prose()}
    rows = blocks(tokens(training, tokenizer), LENGTH, calibration_blocks)
    return Text(
        [{"input_ids": part} for part in rows.split(BATCH)],
        {kind: blocks(tokens(files, tokenizer), LENGTH, held_blocks) for kind, files in kinds.items()},
    )


def load_dense(model: str | Path, device: torch.device):
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device).eval()


def perplexity(parts: list[float]) -> float:
    return math.exp(sum(parts) / len(parts))


def evaluated(model, text: Text) -> dict:
    """Of each kind of text: held-out losses in nats per token, by parts of `PART` blocks, and the perplexity."""
    losses = {kind: [held_out_loss(model, part) for part in rows.split(PART)] for kind, rows in text.held.items()}
    return {"losses": losses, "perplexity": {kind: perplexity(parts) for kind, parts in losses.items()}}


def compare(dense, text: Text, methods: list[str], keeps: list[float], done: dict, save: Callable) -> dict:
    """Every method at every part kept."""
    if not done:
        facts = {"parameters": parameters(dense), "shapes": target_shapes(dense), **evaluated(dense, text)}
        done = {"dense": facts, "rows": []}

    def make(keep: float, method: str) -> dict:
        small, facts = compressed(dense, method, keep, text.calibration)
        return facts | evaluated(small, text)

    wanted = [(keep, method) for keep in keeps for method in methods]
    fill(done["rows"], wanted, ("keep", "method"), make, lambda: save(done), "language model")
    return done


def cost(dense, text: Text, methods: list[str], keep: float, done: dict, save: Callable) -> dict:
    """Seconds (of the processor, with one thread) and peak memory of making each method's model."""
    done = done or {"keep": keep, "tokens": sum(batch["input_ids"].numel() for batch in text.calibration), "rows": []}

    def make(method: str) -> dict:
        _, facts = compressed(dense, method, keep, text.calibration)
        return {key: facts[key] for key in ("seconds", "peak_bytes")}

    fill(done["rows"], [(method,) for method in methods], ("method",), make, lambda: save(done), "cost")
    return done


RESIDUALS = {
    "none": ("NF4", None),
    "plain": ("+ plain SVD of what is missing", {"decomposition": "plain", **UNIFORM}),
    "uniform": ("+ second moment, one rank (EoRA-style)", UNIFORM),
    "mix-lstsq": ("+ mixed ranks + lstsq (default)", {}),
}


def residuals(dense, text: Text, model: str | Path, rank: int, done: dict, save: Callable) -> dict:
    """The base in NF4, and with low-rank factors next to its 4-bit weights; in float32 otherwise."""
    done = done or {"rank": rank, "dense": evaluated(dense, text), "rows": []}

    def make(name: str) -> dict:
        tuned = AutoModelForCausalLM.from_pretrained(
            model,
            quantization_config=nf4(torch.float32),
            dtype=torch.float32,
            device_map={"": next(dense.parameters()).device},
        ).eval()
        if name != "none":
            settings = {"residual": {"reference_model": dense, "rank": rank}, **RESIDUALS[name][1]}
            config = MixedRankConfig(calibration_data=text.calibration, progress=False, **settings)
            tuned = get_peft_model(tuned, config)
        added = sum(p.numel() for key, p in tuned.named_parameters() if "mixed_rank_" in key)
        return {"added_parameters": added, **evaluated(tuned, text)}

    fill(done["rows"], [(name,) for name in RESIDUALS], ("method",), make, lambda: save(done), "residuals")
    return done
