"""`layer_weight="fisher"` follows the loss that the model itself gives."""

import logging

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_qst.base_model.linear_layers import is_linear
from hf_qst.calibration import CalibrationError
from hf_qst.mixed_rank import MixedRankConfig, compress
from hf_qst.mixed_rank.sensitivity import fisher_weights
from tests.architectures import tiny, token_batch
from tests.tiny_widths import ENCODER_DECODER, PATCHES, WIDTHS

IDS = token_batch(8, 12)


def draw(*shape, high=2, seed=0):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def bert(kind, **changes):
    return kind(BertConfig(**WIDTHS, vocab_size=100, initializer_range=0.3, **changes))


def whisper():
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    sizes = {"vocab_size": 100, "max_source_positions": 20, "num_mel_bins": 8}
    return WhisperForConditionalGeneration(WhisperConfig(**ENCODER_DECODER, **special, **sizes))


def clip():
    text = {**WIDTHS, "vocab_size": 100, "max_position_embeddings": 40, "eos_token_id": 99}
    return CLIPModel(CLIPConfig(text_config=text, vision_config={**WIDTHS, **PATCHES}, projection_dim=16))


def segformer():
    shape = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32]}
    rest = {"patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [2, 4], "decoder_hidden_size": 32}
    return SegformerForSemanticSegmentation(SegformerConfig(**shape, **rest, num_labels=5))


def t5():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=100, decoder_start_token_id=0, **sizes))


def llava():
    vision = {"model_type": "clip_vision_model", **WIDTHS, **PATCHES}
    text = LlamaConfig(**WIDTHS, vocab_size=128)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, image_seq_length=16)
    )


def with_patches():
    ids = token_batch(2, 30, low=8)
    ids[:, 2:18] = 4
    return {"input_ids": ids, "pixel_values": noise(2, 3, 32, 32), "labels": ids.masked_fill(ids == 4, -100)}


TEXT = {"input_ids": IDS}
CASES = {
    "token labels": (lambda: bert(BertForTokenClassification, num_labels=4), {**TEXT, "labels": draw(8, 12, high=4)}),
    "masked tokens": (lambda: bert(BertForMaskedLM), {**TEXT, "labels": IDS.masked_fill(draw(8, 12) == 0, -100)}),
    "regression": (lambda: bert(BertForSequenceClassification, num_labels=1), {**TEXT, "labels": noise(8)}),
    "several labels": (
        lambda: bert(BertForSequenceClassification, num_labels=3),
        {**TEXT, "labels": draw(8, 3).float()},
    ),
    "answers": (
        lambda: bert(BertForQuestionAnswering),
        {**TEXT, "start_positions": draw(8, high=12), "end_positions": draw(8, high=12, seed=1)},
    ),
    "two heads": (lambda: bert(BertForPreTraining), {**TEXT, "labels": IDS, "next_sentence_label": draw(8)}),
    "T5": (t5, {**TEXT, "labels": draw(8, 7, high=90)}),
    "speech": (whisper, {"input_features": noise(4, 8, 40), "labels": draw(4, 7, high=90)}),
    "contrast": (clip, {"input_ids": IDS[:4], "pixel_values": noise(4, 3, 32, 32), "return_loss": True}),
    "pixels": (segformer, {"pixel_values": noise(2, 3, 32, 32), "labels": draw(2, 32, 32, high=5)}),
    "image and text": (llava, with_patches()),
    "a causal model's own labels": (lambda: tiny("llama"), {**TEXT, "labels": IDS.roll(3, 1)}),
}


def reached(model, batch):
    """Linear layers that run, and the gradient of the model's own loss at each one's outputs, by name."""
    outputs: dict[str, list[torch.Tensor]] = {}
    handles = [
        module.register_forward_hook(lambda m, a, y, name=name: outputs.setdefault(name, []).append(y))
        for name, module in model.named_modules()
        if is_linear(module)
    ]
    loss = model(**batch).loss
    for handle in handles:
        handle.remove()
    flat = [(name, y) for name, several in outputs.items() for y in several]
    gradients = torch.autograd.grad(loss, [y for _, y in flat], allow_unused=True)
    found = dict.fromkeys(outputs, 0.0)
    for (name, y), gradient in zip(flat, gradients, strict=True):
        found[name] += 0.0 if gradient is None else gradient.double().square().sum().item() / y.shape[-1]
    return found


def build(make):
    torch.manual_seed(0)
    return make().eval()


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_the_models_own(case):
    make, batch = CASES[case]
    model = build(make)
    raw = reached(model, batch)
    problem = getattr(model.config, "problem_type", None)
    model.config.problem_type = None
    found = fisher_weights(model, dict.fromkeys(raw, 1.0), [batch], progress=False)
    mean = sum(raw.values()) / len(raw)
    assert found == pytest.approx({name: value / mean for name, value in raw.items()}, rel=1e-3, abs=1e-9)
    # transformers wrote its guess into the configuration; we took it back.
    assert model.config.problem_type is None or problem is None


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_padding_on_either_side_counts_for_nothing(name, side):
    model = tiny(name)
    names = dict.fromkeys((n for n, m in model.named_modules() if is_linear(m) and "head" not in n), 1.0)
    pad = (5, 0) if side == "left" else (0, 5)
    padded = {
        "input_ids": nn.functional.pad(IDS, pad, value=7),
        "attention_mask": nn.functional.pad(torch.ones_like(IDS), pad),
        "position_ids": nn.functional.pad(torch.arange(12), pad).expand(8, -1),
    }
    plain = fisher_weights(model, names, [TEXT], False)
    assert fisher_weights(model, names, [padded], False) == pytest.approx(plain, rel=1e-3)


def test_batches_without_labels_are_left_out_and_counted(caplog):
    model = build(CASES["token labels"][0])
    batch = CASES["token labels"][1]
    names = dict.fromkeys(reached(model, batch), 1.0)
    with caplog.at_level(logging.WARNING):
        found = fisher_weights(model, names, [batch, {**batch, "labels": torch.full((8, 12), -100)}], False)
    assert "1 of 2 batches have no labels to predict" in caplog.text
    assert found == pytest.approx(fisher_weights(model, names, [batch], False))


@pytest.mark.parametrize(
    "make, batch",
    [
        (lambda: bert(BertForMaskedLM), TEXT),
        (llava, {key: value for key, value in with_patches().items() if key != "labels"}),
        (lambda: tiny("llama").model, TEXT),
    ],
)
def test_a_model_whose_labels_are_not_known_needs_them(make, batch):
    model = build(make)
    name = next(n for n, m in model.named_modules() if is_linear(m))
    with pytest.raises(
        CalibrationError, match=rf"labels in calibration_data; batch 0 has .* {type(model).__name__} gives no loss"
    ):
        fisher_weights(model, {name: 1.0}, [batch], False)


def test_a_layer_whose_output_is_not_used_weighs_nothing():
    """The last block of LLaVA's vision tower runs, and the one before it is read."""
    model = build(llava)
    unused, used = (f"model.vision_tower.encoder.layers.{i}.mlp.fc1" for i in (1, 0))
    found = fisher_weights(model, {unused: 1.0, used: 1.0}, [with_patches()], False)
    assert found == {unused: 0.0, used: 2.0}
    settings = MixedRankConfig(
        keep_ratio=0.5, target_modules=r".*layers\.\d+\..*", allocation={"layer_weight": "fisher"}, progress=False, compensation={"method": "kd", "steps": 1},
    )  # fmt: skip
    assert compress(model, settings, [with_patches()] * 2).factors
