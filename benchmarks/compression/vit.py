"""The vision transformer's rows of the compression benchmark: accuracy on real digits, by seed, with intervals."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from statistics import mean, stdev

import torch
from tqdm.auto import tqdm
from transformers import set_seed

from benchmarks.compression.methods import budget, compressed, off_budget, parameters, place
from examples import compress_vit
from hf_qst import MixedRankConfig
from hf_qst.base_model.linear_layers import dense_shape
from hf_qst.mixed_rank.targets import find_targets

LEARNING_RATE = 2e-3
# Student's 97.5 % points by degrees of freedom.
_STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half width of Student's 95 % interval; None for a single value or more than ten."""
    width = _STUDENT.get(len(values) - 1)
    return mean(values), None if width is None else width * stdev(values) / math.sqrt(len(values))


def trained(seed: int, epochs: float, device: torch.device):
    """The dense model of a seed, and the seed's training and test images."""
    training, test = compress_vit.digits(seed)
    set_seed(seed)
    model = compress_vit.new_vit()
    with tempfile.TemporaryDirectory() as folder:
        compress_vit.train(model, training, epochs, LEARNING_RATE, folder, seed)
    return model.to(device).eval(), training, test


def compare(
    methods: list[str],
    keeps: list[float],
    seeds: int,
    epochs: float,
    images: int,
    done: dict,
    save: Callable[[dict], None],
    device: torch.device,
) -> dict:
    """Accuracy in percent of every method at every part kept, for each seed: its split, its model, its calibration.

    Rows that are in `done` already are not made again; `save` is given each state.
    """
    result = done or {"seeds": []}
    wanted = [(keep, method) for keep in keeps for method in methods]
    for seed in tqdm(range(seeds), desc="vision transformer", unit="seed"):
        found = next((one for one in result["seeds"] if one["seed"] == seed), {"seed": seed, "rows": []})
        have = {(row["keep"], row["method"]) for row in found["rows"]}
        missing = [pair for pair in wanted if pair not in have]
        if not missing:
            continue
        model, training, test = trained(seed, epochs, device)
        found["dense"] = dense_facts(model, training, test)
        batches = compress_vit.calibration(training, images)
        found["rows"] += [_row(model, test, method, keep, batches, found["dense"]) for keep, method in missing]
        others = [one for one in result["seeds"] if one["seed"] != seed]
        result["seeds"] = sorted([*others, found], key=lambda one: one["seed"])
        save(result)
    return result


def dense_facts(model, training: compress_vit.Images, test: compress_vit.Images) -> dict:
    names = find_targets(model, MixedRankConfig())
    return {
        "parameters": parameters(model),
        "targets": sum(math.prod(dense_shape(model.get_submodule(name))) for name in names),
        "accuracy": compress_vit.accuracy(model, test),
        "training_accuracy": compress_vit.accuracy(model, training),
    }


def _row(model, test: compress_vit.Images, method: str, keep: float, batches: list[dict], dense: dict) -> dict:
    small, facts = compressed(model, method, keep, batches, progress=False)
    allowed = budget(dense["parameters"], dense["targets"], keep)
    reached = compress_vit.accuracy(small, test)
    row = {"keep": keep, "method": method, "budget": allowed, "below_budget": off_budget(facts, allowed), **facts}
    return row | {"accuracy": reached, "drop": dense["accuracy"] - reached}


def summary(result: dict) -> list[dict]:
    """Over the seeds, by part kept and method: accuracy and points lost, each as (mean, half width).

    A method that was run on some seeds only is left out.
    """
    pairs = sorted(
        {(row["keep"], row["method"]) for one in result["seeds"] for row in one["rows"]}, key=lambda pair: place(*pair)
    )
    found = []
    for keep, method in pairs:
        rows = [row for one in result["seeds"] for row in one["rows"] if (row["keep"], row["method"]) == (keep, method)]
        if len(rows) < len(result["seeds"]):
            continue
        found.append(
            {
                "keep": keep,
                "method": method,
                "parameters": rows[0]["parameters"],
                "accuracy": interval([row["accuracy"] for row in rows]),
                "drop": interval([row["drop"] for row in rows]),
            }
        )
    return found
