"""Distances of predictions by the model's head, against torch's own distributions."""

import copy

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, kl_divergence
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    CLIPConfig,
    CLIPModel,
    SegformerConfig,
    SegformerForSemanticSegmentation,
)

from hf_qst.base_model.linear_layers import is_linear
from hf_qst.mixed_rank import MixedRankConfig, compress
from hf_qst.mixed_rank.predictions import mean_divergence
from tests.architectures import tiny, token_batch
from tests.tiny_widths import ENCODER_DECODER
from tests.tiny_widths import ONE_LAYER as WIDTHS

IDS = token_batch(6, 10)
MASK = (torch.arange(10) < 7).long().expand(6, 10).clone()
MASK[0] = 0  # a text without tokens
TEXT = {"input_ids": IDS, "attention_mask": MASK}
REAL = MASK.bool()


def bert(kind, **changes):
    return kind(BertConfig(**WIDTHS, vocab_size=100, initializer_range=0.3, **changes))


def bart():
    return BartForConditionalGeneration(BartConfig(vocab_size=100, init_std=0.3, **ENCODER_DECODER))


def segformer(classes=5):
    shape = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32]}
    rest = {"patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [2, 4], "decoder_hidden_size": 32}
    return SegformerForSemanticSegmentation(SegformerConfig(**shape, **rest, num_labels=classes, initializer_range=0.5))


def clip():
    text = {**WIDTHS, "vocab_size": 100, "max_position_embeddings": 40, "eos_token_id": 99}
    vision = {**WIDTHS, "image_size": 32, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def classes(one, other, rows=None):
    found = kl_divergence(Categorical(logits=one), Categorical(logits=other))
    return (found if rows is None else found[rows]).mean()


def labels(one, other):
    return kl_divergence(Bernoulli(logits=one), Bernoulli(logits=other)).sum(-1)[1:].mean()


def squares(one, other):
    return (one - other).square()[1:].mean()


def part(one, other):
    return (one - other).square().mean() / one.square().mean()


def of_logits(distance):
    return lambda one, other: distance(one.logits, other.logits)


DECODER = torch.arange(8) < torch.tensor([[3], [8], [5], [8], [8], [1]])
PIXELS = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
CASES = {
    "one class": (
        lambda: bert(BertForSequenceClassification, num_labels=3),
        TEXT,
        of_logits(lambda a, b: classes(a[1:], b[1:])),
    ),
    "a class for each token": (
        lambda: bert(BertForTokenClassification, num_labels=3),
        TEXT,
        of_logits(lambda a, b: classes(a, b, REAL)),
    ),
    "labels, by the configuration": (
        lambda: bert(BertForSequenceClassification, num_labels=3, problem_type="multi_label_classification"),
        TEXT,
        of_logits(labels),
    ),
    "labels, by their type": (
        lambda: bert(BertForSequenceClassification, num_labels=3),
        {**TEXT, "labels": torch.ones(6, 3)},
        of_logits(labels),
    ),
    "one number": (lambda: bert(BertForSequenceClassification, num_labels=1), TEXT, of_logits(squares)),
    "three numbers": (
        lambda: bert(BertForSequenceClassification, num_labels=3, problem_type="regression"),
        TEXT,
        of_logits(squares),
    ),
    "a decoder's tokens": (
        bart,
        {"input_ids": IDS, "labels": token_batch(6, 8, seed=2).masked_fill(~DECODER, -100)},
        of_logits(lambda a, b: classes(a, b, DECODER)),
    ),
    "pixels": (segformer, PIXELS, of_logits(lambda a, b: classes(a.movedim(1, -1), b.movedim(1, -1)))),
    "pixels of one class": (
        lambda: segformer(1),
        PIXELS,
        of_logits(lambda a, b: kl_divergence(Bernoulli(logits=a), Bernoulli(logits=b)).mean()),
    ),
    "answers": (
        lambda: bert(BertForQuestionAnswering),
        TEXT,
        lambda a, b: classes(a.start_logits, b.start_logits) + classes(a.end_logits, b.end_logits),
    ),
    "a backbone": (
        lambda: bert(BertModel),
        TEXT,
        lambda a, b: (
            part(a.last_hidden_state[REAL], b.last_hidden_state[REAL]) + part(a.pooler_output[1:], b.pooler_output[1:])
        ),
    ),
    "images and texts": (
        clip,
        {"input_ids": IDS[:2], **PIXELS},
        lambda a, b: sum(part(a[k], b[k]) for k in ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_distance_is_that_of_the_models_head(case):
    make, batch, distance = CASES[case]
    torch.manual_seed(0)
    model = make().eval()
    other = copy.deepcopy(model)
    modules = {
        name: m for name, m in other.named_modules() if is_linear(m) and name.endswith(("fc1", "intermediate.dense"))
    }
    with torch.no_grad():
        for module in modules.values():
            module.weight += 0.3 * torch.randn(module.weight.shape) * module.weight.std()
        shown = {key: value for key, value in batch.items() if key != "labels"}
        if model.config.is_encoder_decoder:
            shown["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
        expected = distance(model(**shown), other(**shown)).item()
    assert mean_divergence(model, model, modules, [batch]) == pytest.approx(expected, rel=1e-3)
    assert expected > 1e-5


def test_batches_weigh_by_their_rows():
    model, other = tiny("llama"), tiny("llama", seed=1)
    modules = {name: m for name, m in other.named_modules() if name.endswith("up_proj")}
    long, short = ({"input_ids": IDS, "attention_mask": (torch.arange(10) < n).long().expand(6, 10)} for n in (9, 3))
    one, two = (mean_divergence(model, model, modules, [batch]) for batch in (long, short))
    assert mean_divergence(model, model, modules, [long, short]) == pytest.approx(0.75 * one + 0.25 * two, rel=1e-4)


@pytest.mark.parametrize("how", [{"allocation": "auto"}, {"compensation": {"method": "kd", "steps": 6}}])
@pytest.mark.parametrize("case", ["labels, by their type", "one number", "a backbone", "a decoder's tokens"])
def test_compression_takes_this_distance(case, how):
    make, batch, _ = CASES[case]
    torch.manual_seed(0)
    model = make().eval()
    data = [{**batch, "input_ids": token_batch(6, 10, seed=s)} for s in range(5)]
    names = r".*(fc1|fc2|intermediate\.dense|output\.dense)"
    found = compress(model, MixedRankConfig(keep_ratio=0.3, target_modules=names, progress=False, **how), data)
    if "allocation" in how:
        assert all(one["divergence"] > 1e-4 for one in found.allocation["candidates"])
    else:
        assert 1e-4 < found.distillation["after"] <= found.distillation["before"]
