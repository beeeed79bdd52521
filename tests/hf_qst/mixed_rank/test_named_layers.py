"""Models without a head, of unlisted types, and with several towers: layers named, or those of the known blocks."""

import logging

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    CLIPConfig,
    DINOv3ViTConfig,
    LlavaConfig,
    MambaConfig,
    T5Config,
    WhisperConfig,
    WhisperModel,
)

from hf_qst.base_model.encoder_blocks import find_blocks
from hf_qst.errors import UnsupportedArchitectureError
from hf_qst.mixed_rank import LowRankLinear, MixedRankConfig, compress_model
from tests.architectures import tiny, token_batch
from tests.hf_qst.mixed_rank.test_architectures import EVERY, TARGETS, batch, build, data
from tests.tiny_widths import PATCHES, WIDTHS

VISION = {"model_type": "clip_vision_model", **WIDTHS, **PATCHES}
LANGUAGE = {"model_type": "llama", **WIDTHS, "vocab_size": 128}
SPEECH = {
    "vocab_size": 100, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 8,
    "max_source_positions": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip


def settings(**changes):
    return MixedRankConfig(**{"keep_ratio": 0.5, "progress": False, "compensation": "lstsq", **changes})


def images(rows=4, seed=0):
    return torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def tokens(model, inputs):
    with torch.no_grad():
        output = model.eval()(**inputs)
    return {key: value for key, value in output.items() if torch.is_tensor(value)}


@pytest.mark.parametrize("name", EVERY)
def test_a_backbone_is_compressed_as_with_its_head(name, tmp_path):
    """Nothing of the head is in the factors: the same ranks and weights, under the backbone's own names.

    Without a head there is no loss, by which a causal language model's layers are weighed otherwise.
    """
    whole, alone = build(name), build(name).base_model
    for model in (whole, alone):
        compress_model(model, settings(calibration_data=data(name), allocation={"layer_weight": "none"}))
    found = {n: m for n, m in alone.named_modules() if isinstance(m, LowRankLinear)}
    assert 0 < len(found) <= TARGETS[name]
    for path, layer in found.items():
        assert torch.equal(layer.weight, whole.base_model.get_submodule(path).weight)
    alone.save_pretrained(tmp_path)
    loaded, inputs = AutoModel.from_pretrained(tmp_path), batch(name)
    expected, seen = tokens(alone, inputs), tokens(loaded, inputs)
    assert all(torch.equal(seen[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["llama", "opt", "vit"])
def test_factors_of_a_backbone_load_onto_it(name, tmp_path):
    tuned = get_peft_model(build(name).base_model, settings(calibration_data=data(name)))
    tuned.save_pretrained(tmp_path)
    loaded, inputs = PeftModel.from_pretrained(build(name).base_model, tmp_path), batch(name)
    assert torch.equal(tokens(loaded, inputs)["last_hidden_state"], tokens(tuned, inputs)["last_hidden_state"])


def with_patches(seed):
    ids = token_batch(2, 24, low=8, seed=seed)
    ids[:, 6:22] = 4
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": images(2, seed)}


UNLISTED = {
    "dinov3": (
        AutoModel,
        lambda: DINOv3ViTConfig(**WIDTHS, **PATCHES),
        ["up_proj", "q_proj"],
        lambda seed: {"pixel_values": images(4, seed)},
    ),
    "clip": (
        AutoModel,
        lambda: CLIPConfig(
            text_config={**WIDTHS, "vocab_size": 100, "eos_token_id": 99}, vision_config={**WIDTHS, **PATCHES}
        ),
        ["fc1"],
        lambda seed: {"input_ids": token_batch(4, 12, seed=seed), "pixel_values": images(3, seed)},
    ),
    "llava": (
        AutoModelForImageTextToText,
        lambda: LlavaConfig(vision_config=VISION, text_config=LANGUAGE, image_token_index=4, image_seq_length=16),
        r".*layers\.\d+\..*",
        with_patches,
    ),
    "t5": (
        AutoModelForSeq2SeqLM,
        lambda: T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0),
        r".*block\.\d+\..*",
        lambda seed: {"input_ids": token_batch(4, 12, seed=seed), "labels": token_batch(4, 9, seed=seed + 9)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNLISTED)
def test_named_layers_of_other_models(name, tmp_path):
    auto, make, names, draw = UNLISTED[name]
    torch.manual_seed(0)
    model = auto.from_config(make()).eval()
    calibration = [draw(seed) for seed in range(3)]
    if not find_blocks(model):
        with pytest.raises(UnsupportedArchitectureError, match=r"name its layers in MixedRankConfig\.target_modules"):
            compress_model(model, settings(calibration_data=calibration))
    small = compress_model(model, settings(calibration_data=calibration, target_modules=names))
    assert any(isinstance(module, LowRankLinear) for module in small.modules())
    small.save_pretrained(tmp_path)
    inputs = draw(5)
    if "labels" in inputs:
        inputs["decoder_input_ids"] = inputs.pop("labels")
    expected, seen = tokens(small, inputs), tokens(auto.from_pretrained(tmp_path), inputs)
    assert expected and all(value.isfinite().all() and torch.equal(seen[key], value) for key, value in expected.items())


@pytest.mark.parametrize(
    "compensation, allocation",
    [("lstsq", {}), ("gradient", {}), ("lstsq", {"allocator": "auto"}), ("lstsq", {"layer_weight": "fisher"})],
)
def test_batches_with_and_without_images_compress_both_sides(compensation, allocation):
    auto, make, names, draw = UNLISTED["llava"]
    torch.manual_seed(0)
    model = auto.from_config(make()).eval()
    data = [draw(0), *({"input_ids": token_batch(2, 24, low=8, seed=seed)} for seed in (1, 2)), draw(3)]
    data = [
        {**one, "labels": one["input_ids"].masked_fill(one["input_ids"] == 4, -100)} for one in [*data[1:], data[0]]
    ]
    chosen = {"allow_dense": False, **allocation}
    small = compress_model(
        model, settings(calibration_data=data, target_modules=names, compensation=compensation, allocation=chosen)
    )
    replaced = {n.split(".")[1] for n, m in small.named_modules() if isinstance(m, LowRankLinear)}
    assert replaced == {"vision_tower", "language_model"}


def test_one_tower_is_compressed_by_its_own_inputs():
    """CLIP's own forward wants both; its vision tower's images are enough for the layers inside."""
    torch.manual_seed(0)
    model = AutoModel.from_config(UNLISTED["clip"][1]())
    config = settings(
        calibration_data=[{"pixel_values": images(4, seed)} for seed in range(3)], target_modules=r"vision_model.*fc1"
    )
    replaced = [n for n, m in compress_model(model, config).named_modules() if isinstance(m, LowRankLinear)]
    assert replaced == [f"vision_model.encoder.layers.{i}.mlp.fc1" for i in range(2)]


@pytest.mark.parametrize(
    "make", [lambda: WhisperConfig(**SPEECH), lambda: MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1)]
)
def test_convolutions_are_not_called_experts(make, caplog):
    config = make()
    speech = config.model_type == "whisper"
    torch.manual_seed(0)
    model = WhisperModel(config) if speech else AutoModel.from_config(config)
    assert any(p.dim() == 3 for p in model.parameters())
    ids = {"decoder_input_ids": token_batch(4, 6), "input_features": torch.randn(4, 8, 40)}
    given = ids if speech else {"input_ids": token_batch(4, 12)}
    names = ["fc1"] if speech else ["in_proj"]
    with caplog.at_level(logging.WARNING):
        compress_model(model, settings(calibration_data=[given], target_modules=names))
    assert "experts" not in caplog.text


def test_a_wrapped_model_has_no_known_blocks():
    model = get_peft_model(tiny("llama"), settings(calibration_data=data("llama")))
    with pytest.raises(UnsupportedArchitectureError, match="PeftModel"):
        compress_model(model, settings(calibration_data=data("llama")))
