"""Tiny random mixtures of experts, of the families that people use."""

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

_COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_routed_experts": 4, "moe_intermediate_size": 48,
}  # fmt: skip
_HYBRID = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "num_experts": 4, "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
}  # fmt: skip


def _without(*names):
    return {name: value for name, value in _COMMON.items() if name not in names}


CONFIGS = {
    "mixtral": lambda: MixtralConfig(**_COMMON, num_local_experts=4),
    "qwen3_moe": lambda: Qwen3MoeConfig(**_COMMON, moe_intermediate_size=48, num_experts=4),
    # Transposed weights, interleaved gate and up, biases.
    "gpt_oss": lambda: GptOssConfig(**_COMMON, num_local_experts=4),
    # A first layer without experts, shared experts, latent attention.
    "deepseek_v3": lambda: DeepseekV3Config(
        **_without("head_dim", "num_key_value_heads"), **_LATENT, num_key_value_heads=4
    ),
    "qwen3_next": lambda: Qwen3NextConfig(**_COMMON, **_HYBRID),
}


def tiny_mixture(name, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    # The loop over experts is what ours is compared with; the other implementations round differently.
    model.set_experts_implementation("eager")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)
    return model.eval()
