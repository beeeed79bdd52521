"""The vision transformer's rows of the compression benchmark: accuracy by method and seed, with intervals.

On scikit-learn's digits a seed has its own split, model and calibration images. On Fashion-MNIST there is one model, which
is kept in the user's cache, and a seed has its own calibration images; there a row also holds the compressed model in
int8, or after a short fine-tuning (`VARIANTS_OF`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForImageClassification, BitsAndBytesConfig, set_seed

from benchmarks.common.parts import fill
from benchmarks.common.tables import interval
from benchmarks.compression.methods import METHODS, compressed, parameters, place
from examples import compress_vit, fashion_mnist
from examples.compress_vit import Images, accuracy, calibration, digits, train
from examples.corpus import cache_folder, kept_model

LEARNING_RATE = 2e-3
# Parts of the weights to keep, by the images.
KEEPS = {"digits": [0.4, 0.2, 0.1], "fashion-mnist": [0.6, 0.4, 0.2]}
# After compression: one pass over so many training images.
TUNING = {"images": 20_000, "learning_rate": 1e-4, "batch": 128}
VARIANTS = {"int8": "int8", "tuned": "fine-tuned"}
FASHION_METHODS = ["svd", "asvd", "svd-llm", "mix-lstsq", "mix-kd"]
VARIANTS_OF = {"svd-llm": ["tuned"], "mix-lstsq": ["int8", "tuned"], "mix-kd": ["int8"]}
# bitsandbytes says at every product in which type the inputs are quantised.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


@dataclass
class Dense:
    """A trained model and its images; `facts` are {parameters, accuracy, training_accuracy}, accuracies in percent."""

    model: nn.Module
    training: Images
    test: Images
    facts: dict


def facts_of(model: nn.Module, training: Images, test: Images) -> dict:
    reached, learned = accuracy(model, test), accuracy(model, training)
    return {"parameters": parameters(model), "accuracy": reached, "training_accuracy": learned}


def digits_vit(seed: int, epochs: float, device: torch.device) -> Dense:
    """The model of a seed, trained on the seed's split of the digits."""
    training, test = digits(seed)
    set_seed(seed)
    model = compress_vit.new_vit()
    with tempfile.TemporaryDirectory() as folder:
        train(model, training, epochs, LEARNING_RATE, folder, seed)
    model = model.to(device).eval()
    return Dense(model, training, test, facts_of(model, training, test))


@dataclass(frozen=True)
class Fashion:
    """Which of the vision transformers for Fashion-MNIST, how many epochs it is trained (None: as its size is), where.

    `model` is the folder of one that is trained already. `variants` are those of `VARIANTS` that are measured.
    `quick` trains one step and tests on some images.
    """

    size: str
    epochs: float | None
    model: str | None
    variants: tuple[str, ...]
    device: torch.device
    quick: bool

    @property
    def training(self) -> dict:
        """The arguments of its training."""
        settings = fashion_mnist.TRAINING[self.size] | {"seed": 0}
        epochs = 0.01 if self.quick else self.epochs
        return settings if epochs is None else settings | {"epochs": epochs}


def fashion_vit(fashion: Fashion) -> Path:
    """The folder of the ViT for Fashion-MNIST in the user's cache.

    The first call trains it: the small one takes a quarter of an hour on one CPU core. What was cut short goes on from
    its last epoch.
    """
    settings = fashion.training
    set_seed(settings["seed"])
    model = fashion_mnist.new_vit(fashion.size)
    made_by = json.dumps([settings, model.config.to_dict()], sort_keys=True, default=str)
    name = f"vit-fashion-mnist-{hashlib.sha256(made_by.encode()).hexdigest()[:12]}"
    checkpoint = cache_folder() / "models" / f"{name}.pt"

    def save(folder: Path) -> None:
        training, _ = fashion_mnist.fashion_mnist()
        fashion_mnist.train(model.to(fashion.device), training, **settings, checkpoint=checkpoint)
        model.save_pretrained(folder)

    folder = kept_model(name, save)
    checkpoint.unlink(missing_ok=True)
    return folder


@cache
def fashion_dense(fashion: Fashion) -> Dense:
    training, test = fashion_mnist.fashion_mnist()
    if fashion.quick:
        training, test = (tuple(part[:500] for part in data) for data in (training, test))
    model = AutoModelForImageClassification.from_pretrained(fashion.model or fashion_vit(fashion))
    model = model.to(fashion.device).eval()
    some = tuple(part[: len(test[1])] for part in training)
    return Dense(model, training, test, facts_of(model, some, test) | {"int8": in_int8(model, test)})


def fashion_seed(seed: int, fashion: Fashion) -> Dense:
    """The one model, with the training images in the order of the seed."""
    dense = fashion_dense(fashion)
    order = torch.randperm(len(dense.training[1]), generator=torch.Generator().manual_seed(seed))
    return Dense(dense.model, tuple(part[order] for part in dense.training), dense.test, dense.facts)


def in_int8(model: nn.Module, test: Images) -> dict:
    """Accuracy and bytes on disk of a model that is saved and loaded again in int8."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/float")
        loaded = AutoModelForImageClassification.from_pretrained(
            f"{folder}/float",
            quantization_config=BitsAndBytesConfig(load_in_8bit=True),
            dtype=torch.float32,
            device_map={"": next(model.parameters()).device},
        )
        loaded.save_pretrained(f"{folder}/int8")
        sizes = {
            kind: sum(p.stat().st_size for p in Path(folder, kind).glob("*.safetensors")) for kind in ("float", "int8")
        }
    return {"accuracy": accuracy(loaded, test), "bytes": sizes["int8"], "float_bytes": sizes["float"]}


def tuned(model: nn.Module, training: Images, test: Images, seed: int) -> dict:
    """Accuracy after a short training of the smaller model on labelled images; changes the model."""
    some = tuple(part[: TUNING["images"]] for part in training)
    fashion_mnist.train(model, some, 1, TUNING["learning_rate"], TUNING["batch"], seed)
    return {"accuracy": accuracy(model, test)}


def fashion_variants(
    method: str, model: nn.Module, dense: Dense, seed: int, names: Iterable[str] = tuple(VARIANTS)
) -> dict:
    """What else is measured of a compressed model, by the names of `VARIANTS`, for some methods."""
    wanted = set(VARIANTS_OF.get(method, [])) & set(names)
    made = {"int8": in_int8(model, dense.test)} if "int8" in wanted else {}
    if "tuned" in wanted:
        made["tuned"] = tuned(model, dense.training, dense.test, seed)
    return made


def seeds_of(args: argparse.Namespace) -> range:
    return range(args.first_seed, args.first_seed + args.seeds)


def fashion_of(args: argparse.Namespace) -> Fashion:
    variants = tuple(args.vit_variants)
    return Fashion(args.vit_size, args.vit_epochs, args.vit_model, variants, torch.device(args.device), args.quick)


def compare_digits(args: argparse.Namespace, done: dict, save: Callable[[dict], None]) -> dict:
    dense_of = partial(digits_vit, epochs=args.epochs, device=torch.device(args.device))
    return compare(dense_of, args.methods or list(METHODS), args.vit_keep, seeds_of(args), args.images, done, save)


def compare_fashion(args: argparse.Namespace, done: dict, save: Callable[[dict], None]) -> dict:
    fashion = fashion_of(args)
    dense_of, variants = partial(fashion_seed, fashion=fashion), partial(fashion_variants, names=fashion.variants)
    methods = args.methods or FASHION_METHODS
    return compare(dense_of, methods, args.vit_keep, seeds_of(args), args.images, done, save, variants)


def compare(
    dense_of: Callable[[int], Dense],
    methods: list[str],
    keeps: list[float],
    seeds: Iterable[int],
    images: int,
    done: dict,
    save: Callable[[dict], None],
    variants: Callable[[str, nn.Module, Dense, int], dict] = lambda *_: {},
) -> dict:
    """Accuracy in percent of every method at every part kept, for each seed.

    Args:
        dense_of: takes a seed and gives its dense model and images.
        images: number of calibration images, the first of the seed's training images.
        variants: further results of a row's model, by name, each with its accuracy.
    """
    done = done or {"seeds": []}
    wanted = [(keep, method) for keep in keeps for method in methods]
    for seed in tqdm(seeds, desc="vision transformer", unit="seed"):
        one = next((one for one in done["seeds"] if one["seed"] == seed), None)
        if one is None:
            one = {"seed": seed, "rows": []}
            done["seeds"].append(one)
        if {(row["keep"], row["method"]) for row in one["rows"]} >= set(wanted):
            continue
        dense = dense_of(seed)
        one["dense"] = dense.facts
        batches = calibration(dense.training, images)

        def make(keep: float, method: str, seed=seed, dense=dense, batches=batches) -> dict:
            small, facts = compressed(dense.model, method, keep, batches)
            correct = accuracy(small, dense.test)
            further = variants(method, small, dense, seed)
            for result in (facts, *further.values()):
                result.setdefault("accuracy", correct)
                result["drop"] = dense.facts["accuracy"] - result["accuracy"]
            return facts | further

        fill(one["rows"], wanted, ("keep", "method"), make, partial(save, done), f"seed {seed}")
    return done


def summary(result: dict) -> list[dict]:
    """Over the seeds, by part kept and method: accuracy and points lost, each as (mean, half width).

    A row's variants follow it, with their name under "variant". A method that was run on some seeds only is left out.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in sorted((row for one in result["seeds"] for row in one["rows"]), key=place):
        for variant in (None, *VARIANTS):
            if variant is None or variant in row:
                groups.setdefault((row["keep"], row["method"], variant), []).append(row[variant] if variant else row)
    return [
        {"keep": keep, "method": method, "variant": variant, "parameters": groups[keep, method, None][0]["parameters"]}
        | {name: interval([row[name] for row in rows]) for name in ("accuracy", "drop")}
        for (keep, method, variant), rows in groups.items()
        if len(rows) == len(result["seeds"])
    ]
