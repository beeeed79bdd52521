"""Choices that look at the whole model: layer weights, the allocator that predicts best, and distilled factors."""

import copy
import logging

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForImageClassification

from hf_qst.mixed_rank import LowRankLinear, MixedRankConfig, compress, compress_model
from hf_qst.mixed_rank.allocation import stage
from hf_qst.mixed_rank.calibration_set import CalibrationSet
from hf_qst.mixed_rank.predictions import mean_divergence
from hf_qst.mixed_rank.quantization import quantize_factors
from hf_qst.mixed_rank.sensitivity import fisher_weights
from hf_qst.mixed_rank.targets import find_targets
from tests.architectures import digest, in_nf4, tiny, token_batch
from tests.reshaped_toys import PIXELS, VISION


def batches(count=8, low=0):
    return [{"input_ids": token_batch(4, 12, seed=low + s)} for s in range(count)]


def images(count=8, labels=True):
    draw = lambda seed: torch.randn(PIXELS.shape, generator=torch.Generator().manual_seed(seed))
    target = {"labels": torch.tensor([0, 3])} if labels else {}
    return [{"pixel_values": draw(seed), **target} for seed in range(count)]


def config(**changes):
    return MixedRankConfig(**{"keep_ratio": 0.6, "calibration_data": batches(), "progress": False, **changes})


def vit():
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(VISION["vit"]()).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def energies(model):
    return dict.fromkeys(find_targets(model, config()), 1.0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_fisher_weights_are_the_gradients_autograd_finds(name):
    """Against a graph of its own, with trainable parameters and the model's own loss."""
    model, data = (vit(), images(3)) if name == "vit" else (tiny(name), batches(3))
    found = fisher_weights(model, energies(model), data, progress=False)
    expected = dict.fromkeys(found, 0.0)
    for batch in data:
        twin, outputs = copy.deepcopy(model), {}
        for each in found:
            keep = lambda m, a, y, each=each, outputs=outputs: outputs.update({each: y}) or y.retain_grad()
            twin.get_submodule(each).register_forward_hook(keep)
        twin(**batch, **({} if name == "vit" else {"labels": batch["input_ids"]})).loss.backward()
        for each, output in outputs.items():
            expected[each] += output.grad.square().sum().item() / output.shape[-1]
    mean = sum(expected.values()) / len(expected)
    assert found == pytest.approx({each: value / mean for each, value in expected.items()}, rel=1e-4)
    assert sum(found.values()) / len(found) == pytest.approx(1.0) and max(found.values()) > 2 * min(found.values())


def test_fisher_weights_need_no_gradient_of_the_model_and_leave_it_alone():
    frozen, free = tiny("llama").requires_grad_(False), tiny("llama").train()
    before, state = digest(free), torch.get_rng_state()
    assert fisher_weights(frozen, energies(frozen), batches(2), False) == pytest.approx(
        fisher_weights(free, energies(free), batches(2), False)
    )
    assert all(p.grad is None and p.requires_grad for p in free.parameters())
    assert free.training and digest(free) == before and torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks for m in free.modules())


def test_padding_has_no_part_in_fisher_weights():
    model = tiny("llama")
    rows = batches(2)
    padded = [
        {
            "input_ids": nn.functional.pad(batch["input_ids"], (0, 5), value=0),
            "attention_mask": nn.functional.pad(torch.ones_like(batch["input_ids"]), (0, 5)),
        }
        for batch in rows
    ]
    plain = fisher_weights(model, energies(model), rows, False)
    assert fisher_weights(model, energies(model), padded, False) == pytest.approx(plain, rel=1e-4)


def test_fisher_weights_move_parameters_to_the_layers_that_matter():
    plain, fisher = (
        compress(tiny("llama"), config(allocation={"layer_weight": weight, "rank_multiple": 1}, compensation="none"))
        for weight in ("none", "fisher")
    )
    assert plain.ranks != fisher.ranks
    held_out = batches(4, low=90)
    distance = lambda found: mean_divergence(tiny("llama"), tiny("llama"), found.factors, held_out)
    assert distance(fisher) < distance(plain)
    # What is reported stays the part of a layer's own output.
    assert all(0 <= facts["relative_error"] < 1 for facts in fisher.statistics.values())


@pytest.mark.parametrize(
    "data, message",
    [
        (
            images(2, labels=False),
            r"needs a model with logits and labels in calibration_data; batch 0 has pixel_values",
        ),
        ([{**batch, "labels": torch.tensor([-100, -100])} for batch in images(2)], "the loss on batch 0 .* is nan"),
    ],
)
def test_what_fisher_weights_need_is_named(data, message):
    model = vit()
    before = digest(model)
    with pytest.raises(ValueError, match=message):
        compress_model(model, config(allocation={"layer_weight": "fisher"}, calibration_data=data))
    assert digest(model) == before


def test_auto_takes_what_predicts_best_on_held_out_batches(caplog):
    model = tiny("llama")
    before = digest(model)
    with caplog.at_level(logging.INFO, logger="hf_qst.mixed_rank.pipeline"):
        found = compress(model, config(allocation={"allocator": "auto", "min_rank_ratio": 0.9}))
    assert digest(model) == before
    assert "allocator='auto' chose" in caplog.text
    candidates = found.allocation["candidates"]
    assert [(one["allocator"], one["min_rank_ratio"]) for one in candidates[:2]] == [("hull", 0.5), ("hull", 0.0)]
    assert candidates[2]["allocator"] == "uniform"
    best = min(candidates, key=lambda one: one["divergence"])
    assert found.allocation["chosen"].items() <= best.items()
    data = batches()
    for one in candidates:  # what is recorded is what each candidate by itself gives
        settings = {key: value for key, value in one.items() if key != "divergence"}
        alone = compress(model, config(calibration_data=data[:6], allocation=settings))
        assert one["divergence"] == pytest.approx(mean_divergence(model, model, alone.factors, data[6:]), rel=1e-4)
    again = compress(model, config(allocation=found.allocation["chosen"]))
    assert again.ranks == found.ranks
    assert all(torch.equal(layer.weight, again.factors[name].weight) for name, layer in found.factors.items())


def test_choice_is_saved_with_the_adapter(tmp_path):
    model = get_peft_model(tiny("llama"), config(allocation="auto"))
    chosen = model.peft_config["default"].results.allocation
    assert chosen["chosen"] and model.peft_config["default"].allocation.allocator == "auto"
    model.save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(tiny("llama"), tmp_path).peft_config["default"].results.allocation == chosen


@pytest.mark.parametrize("reference", ["nf4", "pruned"])
def test_auto_and_fisher_work_for_residuals(reference, tmp_path):
    dense, base = tiny("llama", num_labels=2), tiny("llama", num_labels=2)
    if reference == "nf4":
        base = in_nf4(tmp_path)
    else:
        with torch.no_grad():
            for layer in base.model.layers:
                layer.mlp.up_proj.weight[:40] = 0
    settings = {
        "residual": {"rank": 6, "reference_model": dense},
        "target_modules": ["up_proj", "o_proj"],
    }
    model = get_peft_model(base, config(allocation={"allocator": "auto", "layer_weight": "fisher"}, **settings))
    found = model.peft_config["default"]
    assert len(found.results.allocation["candidates"]) == 3 and len(found.rank_pattern) == 6


def test_distilled_factors_predict_better_and_the_start_is_kept_where_they_do_not():
    model, data = vit(), images(10)
    before = digest(model)
    start = compress(model, config(keep_ratio=0.4, calibration_data=data[:9]))
    settings = {"compensation": {"method": "kd", "steps": 90, "lr": 5e-4}}
    found = compress(model, config(keep_ratio=0.4, calibration_data=data, **settings))
    assert digest(model) == before and all(p.grad is None for p in model.parameters())
    assert found.ranks == start.ranks
    distance = lambda one: mean_divergence(model, model, one.factors, data[9:])
    assert found.distillation["before"] == pytest.approx(distance(start), rel=1e-4)
    assert found.distillation["after"] == pytest.approx(distance(found), rel=1e-4)
    assert found.distillation["after"] < 0.9 * found.distillation["before"]
    harmful = config(keep_ratio=0.4, calibration_data=data, compensation={"method": "kd", "lr": 1e3})
    kept = compress(model, harmful)
    assert kept.distillation["steps"] == 4 * 9  # four passes in a row brought nothing
    for name, layer in kept.factors.items():
        assert torch.equal(layer.weight, start.factors[name].weight)


def test_distillation_is_seeded_and_leaves_modes_and_dtypes():
    data = batches(4)
    made = [
        compress_model(tiny("llama", dtype=torch.bfloat16), config(calibration_data=data, compensation="kd", seed=seed))
        for seed in (0, 0)
    ]
    one, two = ([m for m in model.modules() if isinstance(m, LowRankLinear)] for model in made)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(one, two, strict=True))
    assert {p.dtype for p in made[0].parameters()} == {torch.bfloat16}
    assert all(p.requires_grad and p.grad is None for p in made[0].parameters())


def test_distilled_factors_are_quantised_last():
    settings = {"calibration_data": images(6), "compensation": {"method": "kd", "steps": 20}}
    exact, rounded = (compress(vit(), config(**settings, quantize_factors=scheme)) for scheme in (None, "int8"))
    assert exact.ranks == rounded.ranks
    for name, layer in rounded.factors.items():
        assert type(layer.down).__name__ == "Linear8bitLt"
        assert torch.equal(layer.weight, quantize_factors(exact.factors[name], "int8").weight)


def test_a_model_without_logits_is_refused():
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    model.forward = lambda x: nn.Sequential.forward(model, x)
    data = [{"x": torch.randn(64, 32)} for _ in range(4)]
    with pytest.raises(ValueError, match="Sequential gives no logits"):
        compress_model(model, config(target_modules=["0", "2"], calibration_data=data, allocation="auto"))
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear]


def test_split_keeps_at_least_one_batch_on_each_side():
    batches = lambda found: tuple(each.batches for each in found)
    assert batches(CalibrationSet([1, 2]).split(0.1, "a")) == ([1], [2])
    assert batches(CalibrationSet(list(range(8))).split(0.25, "a")) == (list(range(6)), [6, 7])


def ranks(model, data, **changes):
    return compress(model, MixedRankConfig(keep_ratio=0.5, calibration_data=data, progress=False, **changes)).ranks


def test_a_language_model_is_weighed_by_its_loss_by_default(monkeypatch):
    data = batches(3)
    by_loss = ranks(tiny("llama"), data, allocation={"layer_weight": "fisher"})
    same = ranks(tiny("llama"), data, allocation={"layer_weight": "none"})
    assert ranks(tiny("llama"), data) == by_loss != same
    # Not where no loss follows from the batches, and not from more than a few tokens.
    assert ranks(tiny("llama").base_model, data) == {n.removeprefix("model."): rank for n, rank in same.items()}
    monkeypatch.setattr(stage, "SENSITIVITY_TOKENS", 20)
    seen = []
    monkeypatch.setattr(stage, "fisher_weights", lambda m, e, rows, p: seen.extend(rows) or dict.fromkeys(e, 1.0))
    assert ranks(tiny("llama"), data) == same
    assert [row["input_ids"].shape[0] for row in seen] == [1] * len(seen)
    assert 20 <= sum(row["input_ids"].numel() for row in seen) < 20 + data[0]["input_ids"].shape[1]
    assert torch.equal(seen[1]["input_ids"][0], data[1]["input_ids"][0])


def test_a_loss_that_is_not_finite_weighs_nothing_and_is_said(caplog):
    model = tiny("llama")
    model.lm_head.weight.data[3] = torch.nan
    same = ranks(tiny("llama"), batches(2), allocation={"layer_weight": "none"})
    assert ranks(model, batches(2)) == same
    assert "layer_weight='auto': all layers' errors count the same" in caplog.text and "is nan" in caplog.text
