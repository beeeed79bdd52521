"""Tiny random decoders of every type in the table of architectures, from transformers' own configuration classes."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 96
# Given to a configuration as far as it has such a field.
WIDTHS = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "sliding_window": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    # GPT-2 and its like; BART and its like
    "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 128,
    "d_model": 64, "ffn_dim": 128, "num_heads": 4, "decoder_layers": 4, "encoder_layers": 4,
    "decoder_attention_heads": 4, "encoder_attention_heads": 4, "decoder_ffn_dim": 128, "encoder_ffn_dim": 128,
    # mixtures of experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "n_shared_experts": 1, "moe_k": 2, "n_group": 1, "topk_group": 1,
    "shared_expert_intermediate_size": 32, "first_k_dense_replace": 1,
    # latent attention
    "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "rotary_dim": 8,
    # recurrences
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1,
    "mamba_num_heads": 8, "mamba_head_dim": 16,
}  # fmt: skip
WIDTHS |= dict.fromkeys(
    (
        "dropout", "attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout", "activation_dropout",
        "attention_probs_dropout_prob", "hidden_dropout_prob",
    ),
    0.0,
)  # fmt: skip

_LATENT = {"num_key_value_heads": 4}
_INDEXED = {**_LATENT, "index_n_heads": 4, "index_head_dim": 16, "index_topk": 64}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"] * 2}
_WINDOWED = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_CONV = {"layer_types": ["conv", "full_attention"] * 2}
_COMPRESSED = ("compressed_sparse_attention", "heavily_compressed_attention")
_SHARED = {"layers_block_type": ["linear_attention", "hybrid"] * 2}
_DECODER = {"is_decoder": True}


def _each(names: str, changes: dict) -> dict[str, dict]:
    return dict.fromkeys(names.split(), changes)


CHANGES: dict[str, dict] = {
    **_each("axk1 deepseek_v2 deepseek_v3 glm4_moe_lite", _LATENT),
    "youtu": {**_LATENT, "tie_word_embeddings": False},
    **_each("axk2 deepseek_v32 glm_moe_dsa hy_v4", _INDEXED),
    "dots3_note_text": {
        **_INDEXED, "layer_types": ["indexed_attention", "sliding_attention"] * 2, "shared_experts_intermediate_size": 32,
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 32, "swa_kv_lora_rank": 16,
        "swa_head_dim": 32, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16,
    },
    # windows of two and four tokens, that generation closes some
    "deepseek_v4": {
        "num_key_value_heads": 1, "partial_rotary_factor": 0.5, "index_n_heads": 4, "index_head_dim": 16, "index_topk": 2,
        "layer_types": [*_COMPRESSED, "sliding_attention", _COMPRESSED[0]], "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
        "compress_rates": dict(zip(_COMPRESSED, (2, 4), strict=True)), "hc_mult": 2, "o_groups": 2, "o_lora_rank": 8,
    },
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"] * 2, "hc_count": 2, "hc_lowrank": 8, "indexer_n_heads": 2,
        "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 2,
    },
    "cohere_compass_text": {
        **_WINDOWED, "logit_scale": 0.25,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}, "full_attention": None,
        },
    },
    **_each(
        "inkling_text inkling2_text",
        {
            "layer_types": ["hybrid_sliding", "hybrid"] * 2, "sliding_window_size": 8, "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2, "swa_head_dim": 16, "d_rel": 4, "rel_extent": 16, "unpadded_vocab_size": VOCAB,
            "log_scaling_n_floor": 64,
        },
    ),
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid_sliding", "hybrid"] * 2, "router_hidden_size": 16},
    "zamba": {**_SHARED, "mamba_expand": 2, "n_mamba_heads": 2},
    "zamba2": {**_SHARED, "n_mamba_heads": 4, "mamba_ngroups": 1},
    "moshi": {"sliding_window": 64, "tie_word_embeddings": False},
    "phi4_multimodal": {
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "crop_size": 32,
            "image_size": 32, "patch_size": 8,
        },
        "audio_config": {
            "hidden_size": 32, "intermediate_size": 64, "num_blocks": 1, "num_attention_heads": 4, "nemo_conv_channels": 8,
            "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32,
        },
    },
    **_each("qwen3_5_text qwen3_5_moe_text qwen3_next olmo_hybrid granitemoehybrid", _LINEAR),
    **_each("bailing_hybrid", {**_LINEAR, **_LATENT}),
    "kimi_linear": {
        **_LINEAR, **_LATENT, "linear_attn_config": {"num_heads": 4, "head_dim": 16}, "linear_num_heads": 4, "linear_head_dim": 16,
    },
    **_each("lfm2 lfm2_moe lfm3", {**_CONV, "block_auto_adjust_ff_dim": False}),
    **_each("gemma3_text gemma4_unified_text", _WINDOWED),
    "gemma4_text": {
        **_WINDOWED, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2,
        "global_head_dim": 32,
    },
    "gemma3n_text": {
        **_WINDOWED, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2,
        "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4,
    },
    "minicpm3": {**_LATENT, "dim_model_base": 32},
    "longcat_flash": {
        **_LATENT, "num_layers": 2, "ffn_hidden_size": 64, "expert_ffn_hidden_size": 32, "zero_expert_num": 2,
        "moe_topk": 2,
    },
    **_each("granite granite_swa granitemoe granitemoe_swa granitemoeshared", {"logits_scaling": 8.0}),
    "granitemoehybrid": {**_LINEAR, "logits_scaling": 8.0, "shared_intermediate_size": 128},
    **_each("cohere cohere2 cohere2_moe", {"logit_scale": 0.25}),
    "falcon_h1": {"mamba_d_ssm": 128, "lm_head_multiplier": 0.25},
    "bamba": {"attn_layer_indices": [1, 3]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "ernie4_5_moe": {"moe_num_experts": 4},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]], "window_size": 8},
    "mpt": {"n_layers": 4, "n_heads": 4, "max_seq_len": 128},
    "ctrl": {"n_layer": 4, "n_head": 4, "dff": 128},
    "xglm": {"num_layers": 4, "attention_heads": 4},
    "opt": {"word_embed_proj_dim": 64},
    "dbrx": {
        "n_layers": 4, "n_heads": 4, "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    **_each("bert bert-generation megatron-bert camembert roberta xlm-roberta xlm-roberta-xl data2vec-text", _DECODER),
    **_each("ernie roberta-prelayernorm roformer", _DECODER),
    "big_bird": {**_DECODER, "attention_type": "original_full"},
    "electra": {**_DECODER, "embedding_size": 64},
    "rembert": {**_DECODER, "input_embedding_size": 32, "output_embedding_size": 32},
    "roc_bert": {
        **_DECODER, "enable_pronunciation": False, "enable_shape": False, "pronunciation_vocab_size": 8,
        "shape_vocab_size": 8,
    },
    "xmod": {**_DECODER, "default_language": "en_XX", "languages": ["en_XX"]},
    **_each(
        "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart whisper",
        {**_DECODER, "is_encoder_decoder": False, "forced_eos_token_id": None},
    ),
}  # fmt: skip


def fields(kind: type) -> set[str]:
    """Names of the fields of a configuration class."""
    return {name for base in kind.__mro__ for name in getattr(base, "__annotations__", {})}


def tiny_config(model_type: str, **widths: int):
    """The smallest configuration of a type that has what is peculiar to it; `widths` are in place of those in `WIDTHS`."""
    kind = CONFIG_MAPPING[model_type]
    known = {name: value for name, value in {**WIDTHS, **widths}.items() if name in fields(kind)}
    config = kind(**{**known, **CHANGES.get(model_type, {})})
    config.dtype = torch.float32
    return config


def tiny_decoder(model_type: str, seed: int = 0, **widths: int):
    """A random causal language model of this type in eval mode, float32."""
    torch.manual_seed(seed)
    return spread(AutoModelForCausalLM.from_config(tiny_config(model_type, **widths)))


def spread(model):
    """Weights that give logits far from flat: with the usual 0.02 tests of greedy decoding would compare ties."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            module._fill_padding_idx_with_zero()  # as loading does
    return model.float().eval()
