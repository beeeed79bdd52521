"""The shapes of blocks that several types have, as functions of their text configurations.

`changes` are what a type has otherwise; its row in `hf_qst.base_model.decoder_table` names one of these functions.
"""

from __future__ import annotations

from hf_qst.base_model.architecture import BlockSpec, block_spec


def qwen2(config, **changes) -> BlockSpec:
    return block_spec(config, qkv_bias=True, out_bias=False, **changes)


def qk_norm(config) -> BlockSpec:
    return block_spec(config, qk_norm=True)


def gemma(config, **changes) -> BlockSpec:
    return block_spec(config, activation=config.hidden_activation, post_norms=True, **changes)


def plain_mlp(config, **changes) -> BlockSpec:
    return block_spec(config, **{"gated_mlp": False, **changes})


def layer_norm(config, **changes) -> BlockSpec:
    """Layer norms, a plain MLP and biases everywhere."""
    return plain_mlp(config, **{"norm": "layer", "qkv_bias": True, "out_bias": True, "mlp_bias": True, **changes})


def learned_positions(config, **changes) -> BlockSpec:
    return layer_norm(config, rotary_dim=0, **changes)


def opt(config) -> BlockSpec:
    bias = dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), config.enable_bias)
    return learned_positions(config, norm_eps=1e-5, pre_norm=config.do_layer_norm_before, **bias)


def gpt2(config) -> BlockSpec:
    return learned_positions(config, attention_dropout=config.attn_pdrop)


def phi(config) -> BlockSpec:
    return layer_norm(config, qk_norm=config.qk_layernorm, parallel="one_norm")


def gpt_neox(config) -> BlockSpec:
    parallel = "two_norms" if config.use_parallel_residual else None
    bias = getattr(config, "attention_bias", False)
    return layer_norm(config, qkv_bias=bias, out_bias=bias, parallel=parallel)


def cohere(config, **changes) -> BlockSpec:
    return block_spec(config, **{"norm": "layer", "parallel": "one_norm", "rotary": "interleaved", **changes})


def half(config, **changes) -> BlockSpec:
    return block_spec(config, rotary="half", **changes)


def complex(config, **changes) -> BlockSpec:
    return block_spec(config, rotary="complex", **changes)


def latent(config, **changes) -> BlockSpec:
    """Keys and queries have a part with positions and one without; the side network's are as wide as the former."""
    return block_spec(config, head_dim=config.qk_rope_head_dim, **changes)


def no_positions(config, **changes) -> BlockSpec:
    return block_spec(config, rotary_dim=0, **changes)


def bert(config) -> BlockSpec:
    return learned_positions(config, pre_norm=False)
