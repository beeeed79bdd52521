"""Whose mask a module's rows have: counted by hand for models with several sequences, and against recorded rows."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    BertConfig,
    BertForMultipleChoice,
    BertForSequenceClassification,
    BertLMHeadModel,
    Blip2Config,
    Blip2ForConditionalGeneration,
    CLIPConfig,
    CLIPModel,
    DebertaV2Config,
    DebertaV2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    ViltConfig,
    ViltModel,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    Wav2Vec2Config,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_qst.calibration import CalibrationError, CalibrationRun, collect_statistics, input_groups
from tests.architectures import tiny, token_batch
from tests.tiny_widths import ONE_LAYER as WIDTHS
from tests.tiny_widths import PATCHES

SEQ2SEQ = {
    "vocab_size": 100, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
}  # fmt: skip
IDS, OUT = token_batch(4, 16), token_batch(4, 12, seed=1)
LABELS = OUT.masked_fill(torch.arange(12) >= 7, -100)  # 28 tokens
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def mask(rows, length, tokens, side="right"):
    kept = torch.arange(length) < tokens if side == "right" else torch.arange(length) >= length - tokens
    return kept.long().expand(rows, length).clone()


HALF, LEFT = mask(4, 16, 8), mask(4, 16, 8, "left")


def bert(**changes):
    return BertConfig(**WIDTHS, vocab_size=100, **changes)


def clip():
    text = {**WIDTHS, "vocab_size": 100, "max_position_embeddings": 40, "eos_token_id": 99}
    return CLIPModel(CLIPConfig(text_config=text, vision_config={**WIDTHS, **PATCHES}, projection_dim=16))


def llava():
    vision = {"model_type": "clip_vision_model", **WIDTHS, **PATCHES}
    text = LlamaConfig(**WIDTHS, vocab_size=128)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, image_seq_length=16)
    )


def with_patches(length, tokens):
    ids = token_batch(2, length, low=8)
    ids[:, length - 16 :] = 4
    return {"input_ids": ids, "attention_mask": mask(2, length, tokens, "left"), "pixel_values": IMAGES[:2]}


def blip2():
    text = {
        "model_type": "opt", "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
        "vocab_size": 128, "word_embed_proj_dim": 32,
    }  # fmt: skip
    former = {**WIDTHS, "encoder_hidden_size": 32, "vocab_size": 100}
    settings = {"num_query_tokens": 4, "image_token_index": 4}
    return Blip2ForConditionalGeneration(
        Blip2Config(vision_config={**WIDTHS, **PATCHES}, qformer_config=former, text_config=text, **settings)
    )


def queries():
    ids = token_batch(2, 12, low=8)
    ids[:, 4:8] = 4
    return {"input_ids": ids, "attention_mask": mask(2, 12, 9, "left"), "pixel_values": IMAGES[:2]}


def bart(kind=BartForConditionalGeneration):
    return kind(BartConfig(**SEQ2SEQ))


def t5():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)
    )


def whisper():
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return WhisperForConditionalGeneration(WhisperConfig(**SEQ2SEQ, **special, max_source_positions=20, num_mel_bins=8))


def captioner():
    decoder = bert(is_decoder=True, add_cross_attention=True)
    model = VisionEncoderDecoderModel(
        VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**WIDTHS, **PATCHES), decoder)
    )
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    return model


def deberta():
    settings = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
    return DebertaV2Model(DebertaV2Config(**WIDTHS, vocab_size=100, **settings))


def speech():
    settings = {
        "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
    }  # fmt: skip
    return Wav2Vec2Model(Wav2Vec2Config(**WIDTHS, vocab_size=30, **settings))


FEATURES = torch.randn(4, 8, 40, generator=torch.Generator().manual_seed(0))
TEXT = {"input_ids": IDS, "attention_mask": HALF}
ENCODER, CROSS, DECODER = "encoder.layers.0.fc1", "decoder.layers.0.encoder_attn.k_proj", "decoder.layers.0.fc1"
T5_CROSS, T5_DECODER = "decoder.block.0.layer.1.EncDecAttention.k", "decoder.block.0.layer.2.DenseReluDense.wi"
VISION, LANGUAGE = "vision_tower.encoder.layers.0.mlp.fc1", "language_model.layers.0.mlp.up_proj"
PROJECTOR = "multi_modal_projector.linear_1"
EMPTY_ROW = torch.cat([torch.zeros(1, 16, dtype=torch.long), HALF[1:]])
CASES = {
    # model, batch, rows of modules by the end of their name
    "T5, its labels": (t5, {**TEXT, "labels": LABELS}, {T5_CROSS: 32, T5_DECODER: 28, "lm_head": 28}),
    "T5, decoder mask": (
        t5,
        {"input_ids": IDS, "decoder_input_ids": OUT, "decoder_attention_mask": mask(4, 12, 5, "left")},
        {T5_CROSS: 64, T5_DECODER: 20},
    ),
    "T5, encoder by itself": (t5, TEXT, {"encoder.block.0.layer.0.SelfAttention.q": 32}),
    "BART, labels": (bart, {**TEXT, "labels": LABELS}, {ENCODER: 32, CROSS: 32, DECODER: 28}),
    "BART, labels and their ids": (
        bart,
        {**TEXT, "labels": LABELS, "decoder_input_ids": OUT},
        {ENCODER: 32, CROSS: 32, DECODER: 28},
    ),
    "BART, one text on both sides": (bart, {**TEXT, "decoder_input_ids": IDS}, {ENCODER: 32, CROSS: 32, DECODER: 64}),
    "BART, ids from the text": (bart, TEXT, {ENCODER: 32, CROSS: 32, DECODER: 36}),
    "BART, float masks": (
        bart,
        {"input_ids": IDS, "attention_mask": LEFT.float(), "decoder_input_ids": OUT,
         "decoder_attention_mask": mask(4, 12, 5).bool()},
        {ENCODER: 32, CROSS: 32, DECODER: 20},
    ),
    "BART with a classifier": (
        lambda: bart(BartForSequenceClassification),
        {"input_ids": torch.cat([IDS[:, :-1], torch.full((4, 1), 2)], 1), "attention_mask": LEFT},
        {ENCODER: 32, CROSS: 32, DECODER: 32, "classification_head.dense": 4},
    ),
    "Whisper": (whisper, {"input_features": FEATURES, "labels": LABELS}, {ENCODER: 80, CROSS: 80, DECODER: 28}),
    "captions": (
        captioner,
        {"pixel_values": IMAGES, "labels": LABELS},
        {"encoder.layers.0.mlp.fc1": 68, "crossattention.self.key": 68, "decoder.bert.encoder.layer.0.output.dense": 28},
    ),
    "BERT, an empty row": (
        lambda: BertForSequenceClassification(bert()),
        {"input_ids": IDS, "attention_mask": EMPTY_ROW},
        {"attention.self.query": 24, "pooler.dense": 3, "classifier": 3},
    ),
    "BERT, choices": (
        lambda: BertForMultipleChoice(bert()),
        {"input_ids": IDS.view(2, 2, 16), "attention_mask": EMPTY_ROW.view(2, 2, 16)},
        {"attention.self.query": 24, "pooler.dense": 3},
    ),
    "BERT as a decoder": (
        lambda: BertLMHeadModel(bert(is_decoder=True, add_cross_attention=True)),
        {**TEXT, "encoder_hidden_states": torch.randn(4, 12, 32), "encoder_attention_mask": mask(4, 12, 5)},
        {"attention.self.query": 32, "crossattention.self.query": 32, "crossattention.self.key": 20},
    ),
    "DeBERTa's positions": (deberta, TEXT, {"attention.self.query_proj": 32, "attention.self.pos_key_proj": 16}),
    "CLIP": (
        clip,
        {"input_ids": token_batch(4, 17), "attention_mask": mask(4, 17, 8, "left"), "pixel_values": IMAGES[:3]},
        {"vision_model.encoder.layers.0.mlp.fc1": 51, "text_model.encoder.layers.0.mlp.fc1": 32,
         "visual_projection": 3, "text_projection": 4},
    ),
    "CLIP, images alone": (clip, {"pixel_values": IMAGES[:3]}, {"vision_model.encoder.layers.0.mlp.fc1": 51}),
    "CLIP, text alone": (clip, TEXT, {"text_model.encoder.layers.0.mlp.fc1": 32}),
    "LLaVA": (llava, with_patches(30, 24), {VISION: 34, PROJECTOR: 32, LANGUAGE: 48}),
    "LLaVA, as many tokens as patches": (llava, with_patches(17, 16), {VISION: 34, PROJECTOR: 32, LANGUAGE: 32}),
    "BLIP-2": (
        blip2,
        queries(),
        {"vision_model.encoder.layers.0.mlp.fc1": 34, "qformer.encoder.layer.0.attention.attention.query": 8,
         "language_model.model.decoder.layers.0.fc1": 18},
    ),
    "speech": (
        speech,
        {"input_values": torch.randn(2, 400), "attention_mask": mask(2, 400, 200)},
        {"encoder.layers.0.feed_forward.intermediate_dense": 38},
    ),
    "DINOv3": (
        lambda: DINOv3ViTModel(DINOv3ViTConfig(**WIDTHS, **PATCHES)),
        {"pixel_values": IMAGES},
        {"layer.0.mlp.up_proj": 68},
    ),
}  # fmt: skip


def build(make):
    torch.manual_seed(0)
    return make().eval()


@pytest.mark.parametrize("case", CASES)
def test_each_module_counts_the_tokens_of_its_own_sequence(case):
    make, batch, expected = CASES[case]
    model = build(make)
    names = {end: next(n for n, _ in model.named_modules() if n.endswith(end)) for end in expected}
    groups = input_groups(model, list(names.values()), batch)
    found = {
        name: s.count
        for group, s in collect_statistics(model, groups, [batch], progress=False).items()
        for name in group
    }
    assert {end: found[name] for end, name in names.items()} == expected


def test_the_rows_are_the_right_ones():
    """Moments of a decoder's and an encoder's layer against the rows recorded in a pass of the model by itself."""
    model = build(bart)
    decoder_mask = mask(4, 12, 5, "left")
    batch = {"input_ids": IDS, "attention_mask": HALF, "decoder_input_ids": OUT, "decoder_attention_mask": decoder_mask}
    names = {f"model.{ENCODER}": HALF, f"model.{CROSS}": HALF, f"model.{DECODER}": decoder_mask}
    seen = {}
    keep = lambda name: lambda module, args: seen.update({name: args[0]})
    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    groups = input_groups(model, list(names), batch)
    for group, statistic in collect_statistics(model, groups, [batch], progress=False).items():
        rows = seen[group[0]][names[group[0]].bool()].double().numpy()
        np.testing.assert_allclose(statistic.products.numpy(), rows.T @ rows, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "make, batch, end",
    [
        (lambda: ViltModel(ViltConfig(**WIDTHS, **PATCHES, vocab_size=100)), {**TEXT, "pixel_values": IMAGES}, "query"),
        (whisper, {"input_features": FEATURES, "attention_mask": mask(4, 40, 20), "labels": LABELS}, ENCODER),
    ],
)
def test_rows_that_no_mask_fits_are_refused_only_where_there_is_padding(make, batch, end):
    model = build(make)
    name = next(n for n, _ in model.named_modules() if n.endswith(end))
    with pytest.raises(
        CalibrationError, match=rf"attention_mask marks padding .*{name}.* which of these are padding is not known"
    ):
        collect_statistics(model, [(name,)], [batch], progress=False)
    full = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
    assert collect_statistics(model, [(name,)], [full], progress=False)[(name,)].count > 0


def test_a_module_of_several_sequences_is_refused_only_where_there_is_padding():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.linear = nn.Embedding(100, 8), nn.Linear(8, 8)

        def forward(self, input_ids, attention_mask, pixel_values):
            return self.linear(self.embed(input_ids)).mean() + self.linear(pixel_values).mean()

    model, batch = build(Twice), {**TEXT, "pixel_values": torch.randn(4, 16, 8)}
    with pytest.raises(CalibrationError, match="'linear' is called for several sequences"):
        collect_statistics(model, [("linear",)], [batch], progress=False)
    batch["attention_mask"] = torch.ones_like(HALF)
    assert collect_statistics(model, [("linear",)], [batch], progress=False)[("linear",)].count == 128


def test_tokens_that_no_embedding_looks_up_are_found():
    class OneHot(nn.Module):
        def __init__(self):
            super().__init__()
            self.text, self.image = nn.Linear(100, 8), nn.Linear(8, 8)

        def forward(self, input_ids, attention_mask, pixel_values):
            return self.text(nn.functional.one_hot(input_ids, 100).float()).mean() + self.image(pixel_values).mean()

    batch = {**TEXT, "pixel_values": torch.randn(4, 16, 8)}
    found = collect_statistics(build(OneHot), [("text",), ("image",)], [batch], progress=False)
    assert [found[(name,)].count for name in ("text", "image")] == [32, 64]


def test_a_module_called_by_keyword_is_seen():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return self.linear(input=x)

    model, batch = build(Named), {"x": torch.randn(4, 8)}
    assert input_groups(model, ["linear"], batch) == [("linear",)]
    assert collect_statistics(model, [("linear",)], [batch], progress=False)[("linear",)].count == 4


@pytest.mark.parametrize(
    "value, message",
    [
        (
            torch.where(HALF == 1, 0.0, -torch.inf),
            r"must be 1 for tokens and 0 for padding, got values from -inf to 0\.0",
        ),
        (HALF[:, None, None], r"must be \[batch, seq\], got shape \[4, 1, 1, 16\]"),
        (HALF[0], r"must be \[batch, seq\], got shape \[16\]"),
        ({"full_attention": HALF}, "must be a tensor .*, got dict"),
    ],
)
def test_what_is_no_mask_is_refused(value, message):
    with pytest.raises(CalibrationError, match=f"attention_mask {message}"):
        collect_statistics(
            tiny("llama"), [("model.layers.0.mlp.up_proj",)], [{"input_ids": IDS, "attention_mask": value}]
        )


def test_samples_that_are_not_known_are_asked_for_only_where_they_count():
    """Three images beside four texts: which image a row belongs to is known of neither number."""
    batch = {"input_ids": IDS, "pixel_values": IMAGES[:3]}
    group = ("vision_model.encoder.layers.0.mlp.fc1",)
    collect_statistics(build(clip), [group], [batch], progress=False)
    with pytest.raises(CalibrationError, match=r"fc1' sees rows of which .* metric 'normalized' needs that"):
        collect_statistics(build(clip), [group], [batch], "normalized", progress=False)


def test_not_every_batch_holds_an_image():
    """The first does not: the second tells how the modules run, and each counts the batches that reach it."""
    model, batches = build(llava), [TEXT, with_patches(30, 24)]
    names = [f"model.{name}" for name in (VISION, LANGUAGE)]
    groups = input_groups(model, names, batches)
    assert groups == [(name,) for name in names]
    found = collect_statistics(model, groups, batches, progress=False)
    assert [found[group].count for group in groups] == [34, 32 + 48]
    with pytest.raises(CalibrationError, match=r"fc1' is not reached by calibration_data \(1 such modules\)"):
        input_groups(model, names, [TEXT, TEXT])


def test_rows_are_not_guessed_before_their_sequence_is_known():
    run = CalibrationRun(build(bart))
    run.enter({**TEXT, "decoder_input_ids": IDS})
    with pytest.raises(RuntimeError, match=r"call prepare\(batches\) first"):
        run.rows(DECODER, torch.ones(4, 16, 8))
    run = CalibrationRun(tiny("llama"))
    run.enter({"inputs_embeds": torch.ones(4, 16, 64), "attention_mask": HALF})
    assert len(run.rows("any", torch.ones(4, 16, 8))[0]) == 32


def test_a_module_that_only_some_padded_batches_reach_is_refused():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.router, self.expert = nn.Embedding(100, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, input_ids, attention_mask):
            hidden = self.router(self.embed(input_ids))
            return self.expert(hidden) if input_ids[0, 0] == 50 else hidden

    seen = IDS.clone()
    seen[0, 0] = 50
    batches = [{"input_ids": ids, "attention_mask": HALF} for ids in (IDS.masked_fill(IDS == 50, 51), seen)]
    with pytest.raises(CalibrationError, match="'expert' is reached by some batches"):
        collect_statistics(build(Routed), [("router",), ("expert",)], batches, progress=False)
    full = [{**batch, "attention_mask": torch.ones_like(HALF)} for batch in batches]
    found = collect_statistics(build(Routed), [("router",), ("expert",)], full, progress=False)
    assert [found[(name,)].count for name in ("router", "expert")] == [128, 64]
