"""Llamas of real shapes whose weights are random: what is measured does not depend on their values."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


def llama(vocab, hidden, layers, heads, intermediate, kv_heads=None, theta=10000.0) -> dict:
    """Arguments of a `LlamaConfig`."""
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
        "intermediate_size": intermediate,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }


def dense_llama(config: dict, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """A random Llama, frozen, made on `device` in `dtype`."""
    config = LlamaConfig(**config)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.requires_grad_(False).parameters():
        parameter.normal_(0.0, 0.02, generator=generator) if parameter.dim() > 1 else parameter.fill_(1.0)
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    return model.eval()
