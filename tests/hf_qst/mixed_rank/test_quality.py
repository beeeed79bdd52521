"""What the stages are worth on trained models: a vision transformer for digits, and the examples' language model."""

import copy
import inspect
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples import train_base
from examples.compress_vit import accuracy, calibration, digits, new_vit
from examples.corpus import held_out_loss
from hf_qst.base_model.linear_layers import dense_weight
from hf_qst.mixed_rank import LowRankLinear, MixedRankConfig, compress, compress_model

BASE = Path(train_base.__file__).parent / "base_model"
PLAIN = {"decomposition": "plain", "allocation": "uniform"}
UNIFORM = {"allocation": "uniform", "compensation": "none"}
SAME = {"allocation": {"layer_weight": "none"}}
MIXED = {**SAME, "compensation": "none"}
FULL = {**SAME, "compensation": "lstsq"}
DEFAULT = {}


@pytest.fixture(scope="module")
def vit():
    """A ViT of 200,000 parameters for digits, trained for a few epochs."""
    torch.manual_seed(0)
    model = new_vit()
    (images, labels), _ = digits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    steps = 25 * len(images) // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    model.train()
    for _ in range(steps):
        index = torch.randint(len(images), (64,))
        model(pixel_values=images[index], labels=labels[index]).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def score(model):
    return accuracy(model, digits()[1])


def on_digits(**changes):
    return MixedRankConfig(calibration_data=calibration(digits()[0], 256), progress=False, **changes)


@pytest.mark.slow
def test_vision_transformer_keeps_its_accuracy(vit):
    dense = score(vit)
    assert dense >= 95
    at = lambda keep, **method: score(compress_model(copy.deepcopy(vit), on_digits(keep_ratio=keep, **method)))
    # One image in 540 is 0.19 points; the standard error of an accuracy here is 0.8.
    assert at(0.4) >= dense - 1
    assert at(0.2) >= dense - 3
    plain, uniform, mixed, full = (at(0.1, **method) for method in (PLAIN, UNIFORM, MIXED, FULL))
    print(f"dense {dense:.1f}, keep 0.1: {plain:.1f} {uniform:.1f} {mixed:.1f} {full:.1f}")
    assert mixed >= plain + 8
    assert mixed > uniform
    assert full > mixed


@pytest.mark.slow
def test_quantised_factors_keep_its_accuracy(vit):
    at = lambda scheme: score(compress_model(copy.deepcopy(vit), on_digits(quantize_factors=scheme)))
    found = {scheme: at(scheme) for scheme in (None, "int8", "nf4")}
    print(found)
    assert found["int8"] >= found[None] - 0.5
    assert found["nf4"] >= found[None] - 2


@pytest.mark.slow
def test_every_layer_is_better_than_plain_on_new_images(vit):
    _, (images, _) = digits()
    found = compress(vit, on_digits(keep_ratio=0.4, **UNIFORM))
    plain = compress(vit, on_digits(keep_ratio=0.4, rank_pattern=found.ranks, decomposition="plain"))
    ratios = []
    for name, layer in found.factors.items():
        rows = []
        handle = vit.get_submodule(name).register_forward_pre_hook(
            lambda m, a, rows=rows: rows.append(a[0].flatten(0, -2))
        )
        with torch.no_grad():
            vit(pixel_values=images)
        handle.remove()
        weight = dense_weight(vit.get_submodule(name))
        errors = [((rows[0] @ (weight - one.weight.T)).norm() ** 2).item() for one in (layer, plain.factors[name])]
        assert errors[0] <= errors[1] * (1 + 1e-3), name
        ratios.append(errors[0] / errors[1])
    assert np.mean(ratios) <= 0.35


@pytest.mark.slow
def test_each_stage_helps_the_language_model():
    load = lambda: AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(BASE)

    def rows(modules, count):
        text = "\n".join(inspect.getsource(module) for module in modules)
        ids = torch.tensor(tokenizer(text)["input_ids"])
        return ids[: count * 128].view(count, 128)

    train = rows((inspect, copy), 16)
    held = rows((json.decoder, json.encoder), 16)
    data = [{"input_ids": part} for part in train.split(8)]

    perplexity = lambda model: math.exp(held_out_loss(model, held))
    dense = perplexity(load())
    found = []
    for method in (PLAIN, UNIFORM, MIXED, FULL, DEFAULT):
        small = compress_model(load(), MixedRankConfig(keep_ratio=0.6, calibration_data=data, progress=False, **method))
        assert any(isinstance(module, LowRankLinear) for module in small.modules())
        found.append(perplexity(small))
    print(found, dense)
    plain, uniform, mixed, full, weighed = found
    assert plain > uniform > mixed > full > weighed > dense
