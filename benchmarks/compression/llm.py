"""The language model's rows of the compression benchmark: perplexity by method and part kept, and 4 bits with residuals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import get_peft_model
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from benchmarks.common.measure import ROOT
from benchmarks.compression.methods import UNIFORM, budget, compressed, off_budget, parameters
from examples.corpus import SourceFile, blocks, held_out_loss, split, stdlib_files, tokens, transformers_files
from hf_qst import MixedRankConfig
from hf_qst.base_model.linear_layers import dense_shape
from hf_qst.mixed_rank import ResidualConfig
from hf_qst.mixed_rank.targets import find_targets

BASE = ROOT / "examples" / "base_model"
LENGTH = 512
# Blocks behind one of the losses that are kept, so that two methods can be compared text by text.
PART = 4
BATCH = 8


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


def losses(model, text: Text) -> dict[str, list[float]]:
    """Held-out loss in nats per token of each kind of text, by parts of `PART` blocks."""
    return {kind: [held_out_loss(model, part) for part in rows.split(PART)] for kind, rows in text.held.items()}


def perplexity(parts: list[float]) -> float:
    return math.exp(sum(parts) / len(parts))


def evaluated(model, text: Text) -> dict:
    found = losses(model, text)
    return {"losses": found, "perplexity": {kind: perplexity(parts) for kind, parts in found.items()}}


def dense_facts(model, text: Text) -> dict:
    """What the dense model has and gives; `targets` are the weights that may be factorised."""
    names = find_targets(model, MixedRankConfig())
    shapes = {name: dense_shape(model.get_submodule(name)) for name in names}
    targets = sum(rows * columns for rows, columns in shapes.values())
    return {"parameters": parameters(model), "targets": targets, "shapes": shapes, **evaluated(model, text)}


def compare(
    dense, text: Text, methods: list[str], keeps: list[float], done: dict, save: Callable[[dict], None]
) -> dict:
    """Every method at every part kept. Rows that are in `done` already are not made again; `save` is given each state."""
    result = done or {"dense": dense_facts(dense, text), "rows": []}
    have = {(row["method"], row["keep"]) for row in result["rows"]}
    wanted = [(keep, method) for keep in keeps for method in methods if (method, keep) not in have]
    for keep, method in tqdm(wanted, desc="language model", unit="method"):
        small, facts = compressed(dense, method, keep, text.calibration, progress=False)
        allowed = budget(result["dense"]["parameters"], result["dense"]["targets"], keep)
        row = {"keep": keep, "method": method, "budget": allowed, "below_budget": off_budget(facts, allowed), **facts}
        result["rows"].append(row | evaluated(small, text))
        save(result)
    return result


def cost(dense, text: Text, methods: list[str], keep: float, done: dict, save: Callable[[dict], None]) -> dict:
    """Seconds (of the processor, with one thread) and peak memory of making each method's model.

    Methods that are in `done` already are not made again; `save` is given each state.
    """
    result = done or {"keep": keep, "tokens": sum(batch["input_ids"].numel() for batch in text.calibration), "rows": []}
    have = {row["method"] for row in result["rows"]}
    for method in tqdm([one for one in methods if one not in have], desc="cost", unit="method"):
        _, facts = compressed(dense, method, keep, text.calibration, progress=False)
        result["rows"].append({"method": method, **{key: facts[key] for key in ("seconds", "peak_bytes")}})
        save(result)
    return result


RESIDUALS = {
    "none": ("NF4", None),
    "plain": ("+ plain SVD of what is missing", {"decomposition": "plain", **UNIFORM}),
    "uniform": ("+ second moment, one rank (EoRA-style)", UNIFORM),
    "mix-lstsq": ("+ mixed ranks + lstsq (default)", {}),
}


def residuals(dense, text: Text, model: str | Path, rank: int, done: dict, save: Callable[[dict], None]) -> dict:
    """The base in NF4, and with low-rank factors beside its 4-bit weights; in float32 otherwise.

    Rows that are in `done` already are not made again; `save` is given each state.
    """
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    result = done or {"rank": rank, "dense": evaluated(dense, text), "rows": []}
    have = {row["method"] for row in result["rows"]}
    for name in tqdm([name for name in RESIDUALS if name not in have], desc="residuals", unit="method"):
        base = AutoModelForCausalLM.from_pretrained(
            model, quantization_config=nf4, dtype=torch.float32, device_map={"": next(dense.parameters()).device}
        ).eval()
        tuned = base if name == "none" else get_peft_model(base, _residual_config(name, dense, text, rank))
        added = sum(p.numel() for key, p in tuned.named_parameters() if "mixed_rank_" in key)
        result["rows"].append({"method": name, "added_parameters": added, **evaluated(tuned, text)})
        save(result)
    return result


def _residual_config(name: str, dense, text: Text, rank: int) -> MixedRankConfig:
    return MixedRankConfig(
        residual=ResidualConfig(dense, rank),
        calibration_data=text.calibration,
        progress=False,
        **RESIDUALS[name][1],
    )
