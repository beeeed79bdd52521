"""The vision transformer's rows of the compression benchmark: accuracy on real digits, by seed, with intervals."""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import torch
from tqdm.auto import tqdm
from transformers import set_seed

from benchmarks.common.parts import fill
from benchmarks.common.tables import interval
from benchmarks.compression.methods import compressed, parameters, place
from examples.compress_vit import accuracy, calibration, digits, new_vit, train

LEARNING_RATE = 2e-3


def trained(seed: int, epochs: float, device: torch.device):
    """The dense model of a seed, and the seed's training and test images."""
    training, test = digits(seed)
    set_seed(seed)
    model = new_vit()
    with tempfile.TemporaryDirectory() as folder:
        train(model, training, epochs, LEARNING_RATE, folder, seed)
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
    """Accuracy in percent of every method at every part kept, for each seed: its split, its model, its calibration."""
    done = done or {"seeds": []}
    wanted = [(keep, method) for keep in keeps for method in methods]
    for seed in tqdm(range(seeds), desc="vision transformer", unit="seed"):
        one = next((one for one in done["seeds"] if one["seed"] == seed), {"seed": seed, "rows": []})
        if {(row["keep"], row["method"]) for row in one["rows"]} >= set(wanted):
            continue
        model, training, test = trained(seed, epochs, device)
        reached, learned = accuracy(model, test), accuracy(model, training)
        one["dense"] = {"parameters": parameters(model), "accuracy": reached, "training_accuracy": learned}
        batches = calibration(training, images)

        def make(keep: float, method: str, model=model, test=test, reached=reached, batches=batches) -> dict:
            small, facts = compressed(model, method, keep, batches)
            correct = accuracy(small, test)
            return facts | {"accuracy": correct, "drop": reached - correct}

        fill(one["rows"], wanted, ("keep", "method"), make, lambda: None, f"seed {seed}")
        others = [other for other in done["seeds"] if other["seed"] != seed]
        done["seeds"] = sorted([*others, one], key=lambda one: one["seed"])
        save(done)
    return done


def summary(result: dict) -> list[dict]:
    """Over the seeds, by part kept and method: accuracy and points lost, each as (mean, half width).

    A method that was run on some seeds only is left out.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in sorted((row for one in result["seeds"] for row in one["rows"]), key=place):
        groups.setdefault((row["keep"], row["method"]), []).append(row)
    return [
        {"keep": keep, "method": method, "parameters": rows[0]["parameters"]}
        | {name: interval([row[name] for row in rows]) for name in ("accuracy", "drop")}
        for (keep, method), rows in groups.items()
        if len(rows) == len(result["seeds"])
    ]
