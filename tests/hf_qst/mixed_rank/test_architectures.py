"""Every supported architecture: budget, forward, backward, saving and loading of a compressed model."""

import copy
import logging

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    DeiTConfig,
    SwinConfig,
    ViTConfig,
)
from transformers.pytorch_utils import Conv1D

from hf_qst.errors import UnsupportedArchitectureError
from hf_qst.mixed_rank import LowRankLinear, MixedRankConfig, compress_model
from tests.architectures import CONFIGS, tiny, token_batch
from tests.mixtures import tiny_mixture

_VISION = {"image_size": 16, "patch_size": 4, "num_labels": 5}
_VIT = {**_VISION, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
VISION_CONFIGS = {
    "vit": lambda: ViTConfig(**_VIT),
    "deit": lambda: DeiTConfig(**_VIT),
    "swin": lambda: SwinConfig(**_VISION, embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=2),
}
# Targets in a model: linear layers inside its blocks.
TARGETS = {
    **dict.fromkeys(CONFIGS, 21),
    "opt": 18,
    "gpt2": 12,
    "phi": 18,
    "gpt_neox": 12,
    "vit": 18,
    "deit": 18,
    "swin": 25,
}
EVERY = [*sorted(CONFIGS), *VISION_CONFIGS]


def build(name, **changes):
    if name in CONFIGS:
        return tiny(name, **changes)
    torch.manual_seed(0)
    settings = VISION_CONFIGS[name]()
    # DeiT has two classes for images; without this its Auto class cannot choose.
    settings.architectures = [f"{type(settings).__name__.removesuffix('Config')}ForImageClassification"]
    model = AutoModelForImageClassification.from_config(settings)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def batch(name, seed=0, rows=4):
    if name in CONFIGS:
        return {"input_ids": token_batch(rows, 12, seed=seed)}
    return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(seed))}


def data(name, count=3):
    return [batch(name, seed) for seed in range(count)]


def config(name, **changes):
    return MixedRankConfig(**{"keep_ratio": 0.5, "calibration_data": data(name), "progress": False, **changes})


def logits(model, name):
    with torch.no_grad():
        return model.eval()(**batch(name, 77)).logits


def linear_weights(model):
    """Sizes of the two-dimensional weights, apart from embeddings, by name."""
    return {
        name: module.weight.numel() for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))
    }


@pytest.mark.parametrize("name", EVERY)
def test_compressed_is_smaller_by_the_budget_and_close(name):
    dense, model = build(name), build(name)
    small = get_peft_model(model, config(name, keep_ratio=0.8)).merge_and_unload()
    replaced = [n for n, m in small.named_modules() if isinstance(m, LowRankLinear)]
    kept_dense = linear_weights(small).keys() & linear_weights(dense).keys()
    inside = [n for n in linear_weights(dense) if n in replaced or ".layers." in n or ".h." in n]
    assert len(inside) == TARGETS[name]
    before = sum(linear_weights(dense)[n] for n in inside)
    removed = sum(p.numel() for p in dense.parameters()) - sum(p.numel() for p in small.parameters())
    assert 0.995 * 0.8 * before <= before - removed <= 0.8 * before
    for layer in kept_dense:
        assert torch.equal(small.get_submodule(layer).weight, dense.get_submodule(layer).weight)
    # Random weights have flat spectra, the hardest there are: far from equal, and far from unrelated.
    ours, theirs = logits(small, name), logits(dense, name)
    assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.7
    flat = build(name)
    for layer in replaced:
        original = flat.get_submodule(layer)
        with torch.no_grad():
            original.weight.copy_(
                original.weight.flatten()[torch.randperm(original.weight.numel())].view_as(original.weight)
            )
    assert (ours - theirs).norm() < 0.8 * (logits(flat, name) - theirs).norm()


@pytest.mark.parametrize("name", EVERY)
def test_full_rank_is_the_dense_model(name):
    dense, model = build(name), build(name)
    ranks = {n: min(m.weight.shape) for n, m in model.named_modules() if n in _targets(model)}
    tuned = get_peft_model(model, config(name, rank_pattern=ranks, compensation="none"))
    torch.testing.assert_close(logits(tuned, name), logits(dense, name), atol=1e-4, rtol=1e-4)
    assert tuned.peft_config["default"].rank_pattern == ranks


def _targets(model):
    return [n for n in linear_weights(model) if ".layers." in n or ".h." in n]


@pytest.mark.parametrize("name", EVERY)
def test_saved_factors_load_onto_the_base_without_calibration(name, tmp_path, caplog):
    tuned = get_peft_model(build(name), config(name))
    tuned.save_pretrained(tmp_path)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        loaded = PeftModel.from_pretrained(build(name), tmp_path)
    assert not caplog.text
    assert torch.equal(logits(loaded, name), logits(tuned, name))
    kept = ("rank_pattern", "results")
    for key in kept:
        assert getattr(loaded.peft_config["default"], key) == getattr(tuned.peft_config["default"], key)


@pytest.mark.parametrize("name", EVERY)
def test_smaller_model_saves_and_loads_with_the_auto_class(name, tmp_path):
    small = compress_model(build(name), config(name))
    small.save_pretrained(tmp_path)
    auto = AutoModelForCausalLM if name in CONFIGS else AutoModelForImageClassification
    loaded = auto.from_pretrained(tmp_path)
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in small.parameters())
    assert torch.equal(logits(loaded, name), logits(small, name))


@pytest.mark.parametrize("scheme", [None, "int8"])
@pytest.mark.parametrize("name", ["llama", "gpt2", *VISION_CONFIGS])
def test_backbone_of_a_saved_smaller_model_loads_alone(name, scheme, tmp_path):
    small = compress_model(build(name), config(name, quantize_factors=scheme))
    small.save_pretrained(tmp_path)
    # A new pooler would be made in 8 bits, which transformers does not initialise.
    settings = {"add_pooling_layer": False} if name in ("vit", "deit") and scheme else {}
    alone = AutoModel.from_pretrained(tmp_path, device_map={"": "cpu"}, **settings).eval()
    with torch.no_grad():
        expected, found = (one.eval()(**batch(name)).last_hidden_state for one in (small.base_model, alone))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", EVERY)
def test_factors_train_and_nothing_else_does(name):
    model = get_peft_model(build(name), config(name)).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    inputs = batch(name)
    labels = inputs["input_ids"] if name in CONFIGS else torch.tensor([0, 1, 2, 3])
    losses = []
    for _ in range(6):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all("mixed_rank_factors" in n for n in changed)
    assert {n for n in before if "mixed_rank_factors" in n and n.endswith("weight")} <= changed


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
def test_compressed_model_generates_as_it_predicts(name):
    small = compress_model(build(name), config(name, keep_ratio=0.9))
    prompt = token_batch(2, 6)
    out = small.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        predicted = small(input_ids=out[:, :-1], use_cache=False).logits.argmax(-1)
    assert torch.equal(out[:, 6:], predicted[:, 5:])


def test_conv1d_comes_back_as_conv1d():
    dense = build("gpt2")
    model = get_peft_model(build("gpt2"), config("gpt2")).to_dense()
    assert str(model) == str(dense)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in dense.state_dict().items()}


def test_experts_that_are_not_named_are_left_out_with_a_warning(caplog):
    model = tiny_mixture("mixtral")
    experts = {n: p.shape for n, p in model.named_parameters() if p.dim() == 3}
    assert experts
    with caplog.at_level(logging.WARNING):
        compress_model(model, config("llama", target_modules=["q_proj", "o_proj"], keep_ratio=0.4))
    assert f"{len(experts)} three-dimensional weights" in caplog.text
    assert {n: p.shape for n, p in model.named_parameters() if p.dim() == 3} == experts


def test_classifier_of_a_language_model():
    model = tiny("llama", classifier=True, num_labels=3)
    score = copy.deepcopy(model.score)
    small = compress_model(model, config("llama"))
    assert torch.equal(small.score.weight, score.weight)
    assert any(isinstance(m, LowRankLinear) for m in small.modules())


def test_a_module_of_no_known_kind_with_named_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    model.forward = lambda x: nn.Sequential.forward(model, x)
    rows = [{"x": torch.randn(64, 16)}]
    with pytest.raises(UnsupportedArchitectureError, match="Sequential"):
        compress_model(model, MixedRankConfig(calibration_data=rows))
    small = compress_model(model, MixedRankConfig(keep_ratio=0.5, target_modules=["0", "2"], calibration_data=rows))
    assert [type(m) for m in small] == [LowRankLinear, nn.ReLU, LowRankLinear]
    assert small(rows[0]["x"]).shape == (64, 16)
