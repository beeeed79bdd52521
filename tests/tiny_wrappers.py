"""Tiny random models of text and images, and a batch with images for each."""

from __future__ import annotations

from types import MappingProxyType

import torch
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.tiny_decoders import CHANGES, VOCAB, WIDTHS, fields, spread

IMAGE = 5  # the token in an image's places
_VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8, "num_channels": 3, "head_dim": 8, "num_key_value_heads": 4,
    # Qwen's
    "depth": 2, "num_heads": 4, "out_hidden_size": 64, "spatial_merge_size": 2, "temporal_patch_size": 1, "embed_dim": 32,
    "deepstack_visual_indexes": [0], "fullatt_block_indexes": [1], "window_size": 16, "num_position_embeddings": 16,
}  # fmt: skip
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"] * 2}


class Wrapped:
    """How a type is made small.

    Args:
        image_tokens: places of an image in the text.
        text, vision, own: changes of the three configurations; `vision=None` for a type that has none of the second.
        inputs: of the number of rows, the tensors that come with the text, besides `input_ids`.
    """

    def __init__(self, image_tokens: int, text=None, vision=MappingProxyType({}), own=None, inputs=None):
        self.image_tokens, self.inputs = image_tokens, inputs or _pixels
        self.text, self.vision, self.own = text or {}, vision, own or {}


def _pixels(rows: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


def _with_sizes(rows: int) -> dict[str, torch.Tensor]:
    return {**_pixels(rows), "image_sizes": torch.full((rows, 2), 32)}


def _several_images(rows: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": _pixels(rows)["pixel_values"][:, None]}


def _patches(rows: int) -> dict[str, torch.Tensor]:
    """16 patches of an image [rows * 16, channels * 8 * 8], as Qwen's processors cut them."""
    patches = torch.randn(rows * 16, 3 * 64, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]] * rows)}


def _positioned(rows: int) -> dict[str, torch.Tensor]:
    """Gemma 4's: patches [rows, 16, channels * 8 * 8] with their places."""
    patches = torch.rand(rows, 16, 3 * 64, generator=torch.Generator().manual_seed(1))
    places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1).reshape(1, 16, 2)
    return {"pixel_values": patches, "image_position_ids": places.expand(rows, -1, -1)}


def _merged_patches(rows: int) -> dict[str, torch.Tensor]:
    """Four patches [rows, 4, channels * 16 * 16] with their places."""
    patches = torch.rand(rows, 4, 3 * 256, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": patches, "image_position_ids": _positioned(rows)["image_position_ids"][:, [0, 1, 4, 5]]}


def _flat_patches(rows: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": _patches(rows)["pixel_values"].reshape(rows, 16, -1)}


WRAPPED: dict[str, Wrapped] = {
    "gemma3": Wrapped(
        4, {"layer_types": ["sliding_attention", "full_attention"] * 2}, own={"mm_tokens_per_image": 4}
    ),
    "gemma4": Wrapped(
        4,
        {
            "layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0, "global_head_dim": 32, "vocab_size_per_layer_input": VOCAB,
        },
        {"pooling_kernel_size": 2, "position_embedding_size": 16},
        {"audio_config": None},
        _positioned,
    ),
    "gemma3n": Wrapped(
        1,
        CHANGES["gemma3n_text"],
        {"architecture": "test_resnet", "hidden_size": 96},
        {
            "audio_config": {"hidden_size": 32, "conf_num_hidden_layers": 1, "conf_num_attention_heads": 4},
            "vision_soft_tokens_per_image": 1,
        },
    ),
    "gemma4_unified": Wrapped(
        4,
        CHANGES["gemma4_unified_text"],
        {"pooling_kernel_size": 2, "mm_embed_dim": 32, "output_proj_dims": 32, "mm_posemb_size": 16},
        {"audio_config": {"audio_embed_dim": 16}},
        _merged_patches,
    ),
    "got_ocr2": Wrapped(
        1,
        vision={"output_channels": 16, "mlp_dim": 64, "window_size": 2, "global_attn_indexes": [1]},
        own={"tie_word_embeddings": False},
    ),
    "llama4": Wrapped(
        4,
        {"intermediate_size_mlp": 128, "moe_layers": [1, 3], "attention_chunk_size": 8},
        {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32, "intermediate_size": 128},
    ),
    "emu3": Wrapped(
        20,
        vision=None,
        own={
            "vq_config": {
                "codebook_size": 8, "base_channels": 32, "channel_multiplier": [1, 1, 1, 1], "num_res_blocks": 1,
                "hidden_size": 32, "attn_resolutions": [],
            },
            "vocabulary_map": {
                "<image>": IMAGE, "<|extra_200|>": 6, **{f"<|visual token {i:06d}|>": 80 + i for i in range(8)},
            },
        },
        inputs=_with_sizes,
    ),
    "fuyu": Wrapped(16, vision=None, own={"patch_size": 8, "image_size": 32}, inputs=_flat_patches),
    "qwen4_exp": Wrapped(
        4,
        {
            **CHANGES["qwen4_exp_text"],
            "rope_parameters": {**_MROPE["rope_parameters"], "partial_rotary_factor": 1.0},
        },
        inputs=_patches,
    ),
    "dots3_note": Wrapped(
        4,
        CHANGES["dots3_note_text"],
        {"mlp_layer_types": ["dense", "dense"], "adapter_in_dim": 32, "adapter_out_dim": 64},
        {
            "audio_config": {
                "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
                "downsample_hidden_size": 8, "adapter_input_size": 32, "adapter_out_dim": 64, "feature_size": 16,
            },
        },
        inputs=_patches,
    ),
    "llava": Wrapped(16, vision={"projection_dim": 32}),
    "mistral3": Wrapped(4, own={"spatial_merge_size": 2}, inputs=_with_sizes),
    "paligemma": Wrapped(16, vision={"projection_dim": 64}, own={"projection_dim": 64}),
    "smolvlm": Wrapped(4, own={"scale_factor": 2}, inputs=_several_images),
    "qwen2_5_vl": Wrapped(4, _MROPE, inputs=_patches),
    "qwen2_vl": Wrapped(4, _MROPE, {"hidden_size": 64, "mlp_ratio": 2}, inputs=_patches),
    "qwen3_vl": Wrapped(4, _MROPE, inputs=_patches),
    "qwen3_vl_moe": Wrapped(4, _MROPE, inputs=_patches),
    "qwen3_5_moe": Wrapped(
        4,
        {**_LINEAR, "rope_parameters": {**_MROPE["rope_parameters"], "partial_rotary_factor": 1.0}},
        inputs=_patches,
    ),
    "idefics3": Wrapped(4, own={"scale_factor": 2}, inputs=_several_images),
    "internvl": Wrapped(4, vision={"image_size": [32, 32], "patch_size": [8, 8]}, own={"downsample_ratio": 0.5}),
    "aya_vision": Wrapped(4, own={"downsample_factor": 2}),
    "qwen3_5": Wrapped(
        4,
        {**_LINEAR, "rope_parameters": {**_MROPE["rope_parameters"], "partial_rotary_factor": 1.0}},
        inputs=_patches,
    ),
}  # fmt: skip


def tiny_wrapper(model_type: str, seed: int = 0):
    """A random model of this type in eval mode, float32."""
    kind, small = CONFIG_MAPPING[model_type], WRAPPED[model_type]
    parts = {}
    for name in ("text_config", "vision_config")[: 1 if small.vision is None else 2]:
        default = getattr(kind(), name, None)
        default = kind.sub_configs[name] if default is None else type(default)
        widths, changes = (WIDTHS, small.text) if name == "text_config" else (_VISION, small.vision)
        known = {field: value for field, value in widths.items() if field in fields(default)}
        parts[name] = {"model_type": default.model_type, **known, **changes}
    token = {name: IMAGE for name in ("image_token_id", "image_token_index") if name in fields(kind)}
    others = ("video_token_id", "audio_token_id", "vision_start_token_id", "vision_end_token_id", "boi_token_id")
    token |= {name: 90 + i for i, name in enumerate(others) if name in fields(kind)}
    torch.manual_seed(seed)
    return spread(AutoModelForImageTextToText.from_config(kind(**parts, **token, **small.own)))


def image_batch(model_type: str, rows: int = 2) -> dict[str, torch.Tensor]:
    """Rows of an image in the middle of a text, left-padded by two in the first row."""
    small = WRAPPED[model_type]
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(6, 90, (rows, 10), generator=generator)
    ids = torch.cat([text[:, :4], torch.full((rows, small.image_tokens), IMAGE), text[:, 4:]], 1)
    mask = torch.ones_like(ids)
    ids[0, :2], mask[0, :2] = 0, 0
    kinds = (ids == IMAGE).long()
    return {
        "input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds, "token_type_ids": kinds,
        **small.inputs(rows),
    }  # fmt: skip
