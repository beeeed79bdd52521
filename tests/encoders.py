"""Tiny random encoders, encoder-decoders, vision models and recurrences: one for each type in `encoder_blocks.MODELS`."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel

from tests.architectures import token_batch

_WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = {**_WIDTHS, "intermediate_size": 64, "vocab_size": 96, "max_position_embeddings": 64, "pad_token_id": 1}
_DEBERTA = {**_TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
_PATCHES = {"image_size": 16, "patch_size": 4}
_VISION = {**_WIDTHS, **_PATCHES, "intermediate_size": 64}
_SEQ2SEQ = {
    "vocab_size": 96, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": 2, "decoder_start_token_id": 3,
}  # fmt: skip
_SPEECH = {
    **_WIDTHS, "intermediate_size": 64, "vocab_size": 40, "conv_dim": (16, 16), "conv_stride": (5, 4),
    "conv_kernel": (10, 6), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
_SWIN = {**_PATCHES, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 2}
_TWO_TOWERS = {"text_config": {**_TEXT, "eos_token_id": 2, "bos_token_id": 0}, "vision_config": _VISION}
_SEGFORMER = {
    "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32], "patch_sizes": [3, 3],
    "strides": [2, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2], "decoder_hidden_size": 16,
}  # fmt: skip
_T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "pad_token_id": 0}
_MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "vocab_size": 96, "pad_token_id": 1}
_WHISPER = {**_SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 32}


@dataclass(frozen=True)
class Encoder:
    """Fields of its configuration, its class with a head (None: there is none), and what it reads."""

    fields: dict[str, Any]
    head: str | None
    reads: str = "text"


_CLASSIFIER, _IMAGES = "SequenceClassification", "ImageClassification"
ENCODERS = {
    "bert": Encoder(_TEXT, _CLASSIFIER),
    "roberta": Encoder(_TEXT, _CLASSIFIER),
    "xlm-roberta": Encoder(_TEXT, "TokenClassification"),
    "distilbert": Encoder({**_TEXT, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}, _CLASSIFIER),
    "modernbert": Encoder(_TEXT, "MaskedLM"),
    "electra": Encoder({**_TEXT, "embedding_size": 16}, _CLASSIFIER),
    "mpnet": Encoder(_TEXT, _CLASSIFIER),
    "deberta": Encoder(_DEBERTA, _CLASSIFIER),
    "deberta-v2": Encoder(_DEBERTA, "TokenClassification"),
    "eurobert": Encoder({**_TEXT, "num_key_value_heads": 2}, "MaskedLM"),
    "bart": Encoder({**_SEQ2SEQ, "max_position_embeddings": 64}, "Seq2SeqLM", "text to text"),
    "t5": Encoder({**_T5, "decoder_start_token_id": 0, "eos_token_id": 2}, "Seq2SeqLM", "text to text"),
    "whisper": Encoder(_WHISPER, "SpeechSeq2Seq", "speech to text"),
    "wav2vec2": Encoder(_SPEECH, "CTC", "speech"),
    "hubert": Encoder(_SPEECH, "CTC", "speech"),
    "vit": Encoder(_VISION, _IMAGES, "images"),
    "deit": Encoder(_VISION, _IMAGES, "images"),
    "beit": Encoder({**_VISION, "use_relative_position_bias": True}, _IMAGES, "images"),
    "dinov2": Encoder({**_WIDTHS, **_PATCHES, "mlp_ratio": 2}, _IMAGES, "images"),
    "dinov3_vit": Encoder({**_VISION, "num_register_tokens": 2}, None, "images"),
    "swin": Encoder(_SWIN, _IMAGES, "images"),
    "swinv2": Encoder(_SWIN, _IMAGES, "images"),
    "segformer": Encoder(_SEGFORMER, _IMAGES, "images"),
    "convnext": Encoder({"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "patch_size": 2}, _IMAGES, "images"),
    "mamba": Encoder(_MAMBA, "CausalLM"),
    "falcon_mamba": Encoder(_MAMBA, "CausalLM"),
    "mamba2": Encoder({**_MAMBA, "num_heads": 4, "head_dim": 16, "n_groups": 1}, "CausalLM"),
    "rwkv": Encoder({**_TEXT, "attention_hidden_size": 32, "context_length": 32}, "CausalLM"),
    "clip": Encoder(_TWO_TOWERS, None, "text and images"),
    "clip_text_model": Encoder({**_TEXT, "eos_token_id": 2}, None),
    "clip_vision_model": Encoder(_VISION, None, "images"),
    "siglip": Encoder(_TWO_TOWERS, None, "text and images"),
    "siglip_vision_model": Encoder(_VISION, None, "images"),
}  # fmt: skip


def auto_class(name, bare=False):
    head = ENCODERS[name].head
    return AutoModel if bare or head is None else getattr(transformers, f"AutoModelFor{head}")


def tiny_encoder(name, bare=False):
    config = AutoConfig.for_model(name, **ENCODERS[name].fields)
    # DeiT has two classes for images; without this its Auto class cannot choose.
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForImageClassification"]
    torch.manual_seed(0)
    model = auto_class(name, bare).from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.12)
    return model.eval()


def encoder_batch(name, bare=False, seed=0, padded=False):
    """Inputs of four samples; `padded`: the last tokens of the first are padding, marked as such."""
    reads, draw = ENCODERS[name].reads, torch.Generator().manual_seed(seed)
    batch = {}
    if reads.startswith("text"):
        batch["input_ids"] = token_batch(4, 12, seed=seed)
        batch["attention_mask"] = torch.ones(4, 12, dtype=torch.long)
    if reads.endswith("images"):
        batch["pixel_values"] = torch.randn(4, 3, 16, 16, generator=draw)
    if reads == "speech to text":
        batch["input_features"] = torch.randn(4, 8, 40, generator=draw)
    if reads == "speech":
        batch["input_values"] = torch.randn(4, 1600, generator=draw)
        batch["attention_mask"] = torch.ones(4, 1600, dtype=torch.long)
    if reads.endswith("to text"):
        batch["decoder_input_ids" if bare else "labels"] = token_batch(4, 9, seed=seed + 50)
    if padded:
        batch["attention_mask"][0, -batch["attention_mask"].shape[1] // 4 :] = 0
        if "labels" in batch:
            batch["labels"][1, -3:] = -100
    return batch
