"""The table of decoder architectures: one row a model type, and the wrappers of text and images around them.

To support another architecture, add a row here and, if its smallest configuration needs more than widths, a line to
`tests/architectures.py`. What a row can say is in `hf_qst.base_model.architecture`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from hf_qst.base_model.architecture import (
    Architecture,
    BlockSpec,
    Projections,
    SequentialBlock,
    block_spec,
    first_of,
    first_stream,
    mixture,
)

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATED = ("mlp.gate_proj", "mlp.up_proj")
_SPLIT = Projections(_QKV, "self_attn.o_proj", _GATED, "mlp.down_proj")
_MLP = Projections((), None, _GATED, "mlp.down_proj")
_PLAIN_MLP = Projections(_QKV, "self_attn.o_proj", ("mlp.up_proj",), "mlp.down_proj")
_FUSED_MLP = Projections(_QKV, "self_attn.o_proj", ("mlp.gate_up_proj",), "mlp.down_proj", mlp_stacked=2)
_GATED_QKV = Projections((*_QKV, "self_attn.gate_proj"), "self_attn.o_proj", _GATED, "mlp.down_proj")
_FEED_FORWARD = Projections(
    _QKV, "self_attn.o_proj", ("feed_forward.gate_proj", "feed_forward.up_proj"), "feed_forward.down_proj"
)
# Latent attention, its queries with a factor of their own or without.
_LATENT = Projections(
    ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"), "self_attn.o_proj", _GATED, "mlp.down_proj"
)
_LATENT_PLAIN_QUERIES = Projections(("self_attn.q_proj", "self_attn.kv_a_proj_with_mqa"), "self_attn.o_proj")
# What stands in the place of attention.
_GATED_DELTA_NET = Projections(
    tuple(f"linear_attn.in_proj_{part}" for part in ("qkv", "z", "b", "a")), "linear_attn.out_proj"
)
_GATED_DELTA_NET_FUSED = Projections(("linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba"), "linear_attn.out_proj")
# Blocks that use keys and values of another, or keys as values.
_SHARED_KV = (Projections(_QKV[:2], "self_attn.o_proj"), Projections(_QKV[:1], "self_attn.o_proj"))
_MAMBA = Projections(("mamba.in_proj",), "mamba.out_proj")
_LFM2 = Projections(_QKV, "self_attn.out_proj", ("feed_forward.w1", "feed_forward.w3"), "feed_forward.w2")
# Granite's shared expert is beside the module that holds the others.
_GRANITE_SHARED = Projections(
    _QKV, "self_attn.o_proj", ("shared_mlp.input_linear",), "shared_mlp.output_linear", mlp_stacked=2
)
_GRANITE = replace(_GRANITE_SHARED, experts="block_sparse_moe.experts")
_CONV = Projections(("conv.in_proj",), "conv.out_proj")

_EXPERTS = "the experts and their router"
_ROUTER = "the router"
_SHARED = "the router and the middle of the shared expert"
_POST_NORM = "a norm after the addition mixes pruned and kept channels"
_ADDS_INSIDE = "its layers add to the residual themselves, where pruned channels have no place"


def _qwen2(config, **changes) -> BlockSpec:
    return block_spec(config, qkv_bias=True, out_bias=False, **changes)


def _qk_norm(config) -> BlockSpec:
    return block_spec(config, qk_norm=True)


def _gemma(config, **changes) -> BlockSpec:
    return block_spec(config, activation=config.hidden_activation, post_norms=True, **changes)


def _plain_mlp(config, **changes) -> BlockSpec:
    return block_spec(config, **{"gated_mlp": False, **changes})


def _layer_norm(config, **changes) -> BlockSpec:
    """Layer norms, a plain MLP and biases everywhere."""
    return _plain_mlp(config, **{"norm": "layer", "qkv_bias": True, "out_bias": True, "mlp_bias": True, **changes})


def _learned_positions(config, **changes) -> BlockSpec:
    return _layer_norm(config, rotary_dim=0, **changes)


def _opt(config) -> BlockSpec:
    bias = dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), config.enable_bias)
    return _learned_positions(config, norm_eps=1e-5, pre_norm=config.do_layer_norm_before, **bias)


def _gpt2(config) -> BlockSpec:
    return _learned_positions(config, attention_dropout=config.attn_pdrop)


def _phi(config) -> BlockSpec:
    return _layer_norm(config, qk_norm=config.qk_layernorm, parallel="one_norm")


def _gpt_neox(config) -> BlockSpec:
    parallel = "two_norms" if config.use_parallel_residual else None
    bias = getattr(config, "attention_bias", False)
    return _layer_norm(config, qkv_bias=bias, out_bias=bias, parallel=parallel)


def _cohere(config) -> BlockSpec:
    return block_spec(config, norm="layer", parallel="one_norm", rotary="interleaved")


def _half(config, **changes) -> BlockSpec:
    return block_spec(config, rotary="half", **changes)


def _complex(config, **changes) -> BlockSpec:
    return block_spec(config, rotary="complex", **changes)


def _latent(config, **changes) -> BlockSpec:
    """Keys and queries have a part with positions and one without; the side network's are as wide as the former."""
    return block_spec(config, head_dim=config.qk_rope_head_dim, **changes)


def _no_positions(config, **changes) -> BlockSpec:
    return block_spec(config, rotary_dim=0, **changes)


def _bert(config) -> BlockSpec:
    return _learned_positions(config, pre_norm=False)


def _row(spec: Callable = block_spec, attention: str = "self_attn", **changes) -> Architecture:
    names = {
        "stack": "model",
        "blocks": "layers",
        "final_norm": "norm",
        "embeddings": "embed_tokens",
        "projections": _SPLIT,
    }
    return Architecture(attention=attention, spec=spec, **{**names, **changes})


def _gpt(spec: Callable, attention: str, attention_in: tuple[str, ...], out: str, mlp: tuple[str, str], **changes):
    """Names as GPT-2 has them, but for the layers inside a block."""
    projections = Projections(
        tuple(f"{attention}.{name}" for name in attention_in), f"{attention}.{out}", mlp[:1], mlp[1]
    )
    names = {
        "stack": "transformer",
        "blocks": "h",
        "final_norm": "ln_f",
        "embeddings": "wte",
        "projections": projections,
    }
    return _row(spec, attention, **{**names, **changes})


def _bert_row(stack: str, **changes) -> Architecture:
    """An encoder of BERT's form that runs as a decoder (`config.is_decoder`)."""
    heads = tuple(f"attention.self.{name}" for name in ("query", "key", "value"))
    projections = Projections(heads, "attention.output.dense", ("intermediate.dense",), "output.dense")
    names = {
        "stack": stack, "blocks": "encoder.layer", "final_norm": "none", "embeddings": "embeddings.word_embeddings",
        "projections": projections, "decoder_flag": True, "pruning_refused": _ADDS_INSIDE,
    }  # fmt: skip
    return _row(_bert, "attention", **{**names, **changes})


def _bart_row(pre_norm: bool, **changes) -> Architecture:
    """The decoder of an encoder-decoder, alone."""
    names = {
        "stack": "model.decoder", "final_norm": "layer_norm", "unreached": "encoder_attn",
        "projections": Projections(_QKV, "self_attn.out_proj", ("fc1",), "fc2"),
    }  # fmt: skip
    return _row(lambda c: _learned_positions(c, pre_norm=pre_norm), **{**names, **changes})


def _rows(names: str, row: Architecture) -> dict[str, Architecture]:
    return dict.fromkeys(names.split(), row)


def _moe(spec: Callable = block_spec, host: str = "mlp", **changes) -> Architecture:
    alternatives = (*changes.pop("alternatives", ()), *mixture(host))
    return _row(spec, **{"unpruned": _ROUTER, "alternatives": alternatives, **changes})


_LOGIT_SCALE = lambda config: first_of(config, ("logit_scale",), 1.0)
_LOGITS_SCALING = lambda config: 1 / first_of(config, ("logits_scaling",), 1.0)
_DELTA = {"alternatives": (_GATED_DELTA_NET, _GATED_DELTA_NET_FUSED)}

ARCHITECTURES: dict[str, Architecture] = {
    # Llama's names
    "llama": _row(sequential=SequentialBlock("LlamaDecoderLayer")),
    "mistral": _row(sequential=SequentialBlock("MistralDecoderLayer")),
    "qwen2": _row(_qwen2, sequential=SequentialBlock("Qwen2DecoderLayer")),
    "qwen3": _row(_qk_norm, sequential=SequentialBlock("Qwen3DecoderLayer")),
    **_rows(
        "arcee cwm diffllama exaone4 gemma helium hunyuan_v1_dense hyperclovax internlm3 iquestcoder ministral "
        "ministral3 olmo olmo2 olmo3 seed_oss smollm3 vaultgemma",
        _row(),
    ),
    "bitnet": _row(
        projections=Projections(_QKV, "self_attn.o_proj"), unpruned="the MLP with its norm over the middle channels"
    ),
    "arcee": _row(_plain_mlp, projections=_PLAIN_MLP),
    "apertus": _row(_plain_mlp, projections=_PLAIN_MLP),
    "nanochat": _row(_plain_mlp, projections=Projections(_QKV, "self_attn.o_proj", ("mlp.fc1",), "mlp.fc2")),
    "nemotron": _row(lambda c: _plain_mlp(c, norm="layer"), projections=_PLAIN_MLP),
    "jais2": _row(_layer_norm, projections=_PLAIN_MLP),
    "stablelm": _row(lambda c: block_spec(c, norm="layer", qkv_bias=c.use_qkv_bias)),
    "starcoder2": _row(
        lambda c: _layer_norm(c, **dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), c.use_bias)),
        projections=Projections(_QKV, "self_attn.o_proj", ("mlp.c_fc",), "mlp.c_proj"),
    ),
    "ernie4_5": _row(),
    "gemma2": _row(_gemma),
    "gemma3_text": _row(lambda c: _gemma(c, qk_norm=True)),
    "gemma3n_text": _row(
        lambda c: _gemma(c, qk_norm=True),
        state=first_stream,
        alternatives=_SHARED_KV,
        unpruned="the mixing of residual streams",
    ),
    **_rows(
        "gemma4_text gemma4_unified_text",
        _row(
            lambda c: _gemma(c, qk_norm=True),
            projections=replace(_SPLIT, experts="experts"),
            alternatives=(_SPLIT, *_SHARED_KV),
            unpruned="the router, the middle of the MLP beside the experts, the embeddings of a block",
        ),
    ),
    "granite": _row(logit_multiplier=_LOGITS_SCALING),
    "granite_swa": _row(logit_multiplier=_LOGITS_SCALING),
    **_rows("cohere cohere2", _row(_cohere, logit_multiplier=_LOGIT_SCALE)),
    "phi3": _row(
        projections=Projections(
            ("self_attn.qkv_proj",), "self_attn.o_proj", ("mlp.gate_up_proj",), "mlp.down_proj", mlp_stacked=2
        )
    ),
    "glm": _row(projections=_FUSED_MLP),
    "glm4": _row(lambda c: block_spec(c, post_norms=True), projections=_FUSED_MLP),
    "minicpm3": _row(
        _latent,
        projections=_LATENT,
        logit_multiplier=lambda c: first_of(c, ("dim_model_base",), c.hidden_size) / c.hidden_size,
    ),
    "youtu": _row(_latent, projections=_LATENT, alternatives=(_LATENT_PLAIN_QUERIES,)),
    "doge": _row(unpruned=_EXPERTS),
    # mixtures of experts
    **_rows(
        "flex_olmo mellum mimo_v2_flash minimax_m2 mixtral olmoe phimoe qwen3_moe qwen3_vl_moe_text",
        _moe(),
    ),
    **_rows(
        "aria_text dots1 ernie4_5_moe exaone_moe flint glm4_moe hunyuan_v1_moe hy_v3 kolibri1 minimax_m3_vl_text qwen2_moe "
        "solar_open",
        _moe(unpruned=_SHARED),
    ),
    "afmoe": _moe(projections=_GATED_QKV, unpruned=_SHARED),
    "beam": _moe(projections=_GATED_QKV),
    "laguna": _moe(
        projections=Projections((*_QKV, "self_attn.g_proj"), "self_attn.o_proj", _GATED, "mlp.down_proj"),
        unpruned=_SHARED,
    ),
    "gpt_oss": _moe(_half),
    "cohere2_moe": _moe(_cohere, logit_multiplier=_LOGIT_SCALE),
    **_rows("granitemoe granitemoe_swa", _moe(host="block_sparse_moe", logit_multiplier=_LOGITS_SCALING)),
    "granitemoeshared": _moe(
        host="block_sparse_moe", projections=_GRANITE, unpruned=_SHARED, logit_multiplier=_LOGITS_SCALING
    ),
    **_rows(
        "axk1 deepseek_v3 glm4_moe_lite",
        _moe(_latent, projections=_LATENT, alternatives=(_LATENT_PLAIN_QUERIES,), unpruned=_SHARED),
    ),
    **_rows(
        "axk2 deepseek_v32 glm_moe_dsa",
        _row(_latent, projections=_LATENT, pruning_refused="its choice of tokens is read from outside of the attention"),
    ),
    "longcat_flash": _row(
        _latent, projections=Projections(), pruning_refused="a block has two attentions", unreached=r"router\.classifier"
    ),
    "deepseek_v2": _moe(
        lambda c: _latent(c, rotary="complex"),
        projections=_LATENT,
        alternatives=(_LATENT_PLAIN_QUERIES,),
        unpruned=_SHARED,
    ),
    "llama4_text": _row(
        _complex,
        projections=_FEED_FORWARD,
        unpruned=f"{_EXPERTS}, which are in a form of their own, and the shared expert",
    ),
    "dbrx": _row(
        lambda c: block_spec(c, norm="layer"), attention="norm_attn_norm", pruning_refused="its attention holds the norms of a block", stack="transformer", blocks="blocks", final_norm="norm_f",
        embeddings="wte", projections=Projections(),
    ),
    "jetmoe": _row(
        lambda c: block_spec(c, head_dim=c.kv_channels), attention="self_attention", projections=Projections(),
        pruning_refused="its attention is a mixture of experts",
    ),
    # language models of models of text and images
    **_rows("qwen2_vl_text qwen2_5_vl_text", _row(_qwen2)),
    "qwen3_vl_text": _row(_qk_norm),
    # hybrids of attention and something else
    **_rows("qwen3_5_moe_text qwen3_next", _moe(_qk_norm, unpruned=_SHARED, **_DELTA)),
    "qwen3_5_text": _row(_qk_norm, **_DELTA),
    "olmo_hybrid": _row(
        _qk_norm,
        alternatives=(
            Projections(
                tuple(f"linear_attn.{part}_proj" for part in ("q", "k", "v", "a", "b", "g")), "linear_attn.o_proj"
            ),
        ),
    ),
    "lfm2": _row(final_norm="embedding_norm", projections=_LFM2, alternatives=(_CONV,)),
    "lfm2_moe": _moe(host="feed_forward", final_norm="embedding_norm", projections=_LFM2, alternatives=(_CONV,)),
    "lfm3": _row(
        final_norm="embedding_norm",
        projections=Projections(
            (*_QKV, "self_attn.g_proj"), "self_attn.o_proj", ("feed_forward.w1", "feed_forward.w3"), "feed_forward.w2"
        ),
        alternatives=(_CONV,),
    ),
    "bamba": _row(final_norm="final_layernorm", projections=_FEED_FORWARD, alternatives=(_MAMBA,)),
    "jamba": _moe(
        _no_positions, "feed_forward", final_norm="final_layernorm", projections=_FEED_FORWARD, alternatives=(_MAMBA,),
        unreached="dt_proj",
    ),
    "falcon_h1": _row(
        final_norm="final_layernorm",
        projections=_FEED_FORWARD,
        logit_multiplier=lambda c: first_of(c, ("lm_head_multiplier",), 1.0),
    ),
    "granitemoehybrid": _moe(
        _no_positions,
        "block_sparse_moe",
        projections=_GRANITE,
        alternatives=(_GRANITE_SHARED, _MAMBA),
        unpruned=_SHARED,
        logit_multiplier=_LOGITS_SCALING,
    ),
    "bailing_hybrid": _moe(_latent, projections=_MLP, unpruned=f"the attention, {_SHARED}"),
    "kimi_linear": _moe(_no_positions, projections=_MLP, unpruned=f"the attention, {_SHARED}"),
    "nemotron_h": _moe(
        _no_positions, "mixer", attention="mixer", embeddings="embeddings", final_norm="norm_f",
        projections=Projections(
            ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"), "mixer.o_proj", ("mixer.up_proj",), "mixer.down_proj"
        ),
        alternatives=(Projections(("mixer.in_proj",), "mixer.out_proj"),), unpruned=_SHARED,
    ),
    "recurrent_gemma": _row(
        _no_positions,
        attention="temporal_block",
        final_norm="final_norm",
        projections=Projections(
            tuple(f"temporal_block.{name}_proj" for name in "qkv"), "temporal_block.o_proj",
            ("mlp_block.gate_proj", "mlp_block.up_proj"), "mlp_block.down_proj",
        ),
        alternatives=(
            Projections(("temporal_block.linear_x", "temporal_block.linear_y"), "temporal_block.linear_out"),
        ),
        softcap="logits_soft_cap",
    ),
    # GPT's names
    "gpt2": _gpt(_gpt2, "attn", ("c_attn",), "c_proj", ("mlp.c_fc", "mlp.c_proj")),
    "gpt-sw3": _gpt(_gpt2, "attn", ("c_attn",), "c_proj", ("mlp.c_fc", "mlp.c_proj")),
    "gpt_bigcode": _gpt(_gpt2, "attn", ("c_attn",), "c_proj", ("mlp.c_fc", "mlp.c_proj")),
    "openai-gpt": _gpt(
        lambda c: _gpt2(c), "attn", ("c_attn",), "c_proj", ("mlp.c_fc", "mlp.c_proj"),
        final_norm="none", embeddings="tokens_embed", pruning_refused=_POST_NORM,
    ),
    "gpt_neo": _gpt(_learned_positions, "attn.attention", ("q_proj", "k_proj", "v_proj"), "out_proj", ("mlp.c_fc", "mlp.c_proj")),
    "gptj": _gpt(
        lambda c: _learned_positions(c, qkv_bias=False, out_bias=False, parallel="one_norm"),
        "attn", ("q_proj", "k_proj", "v_proj"), "out_proj", ("mlp.fc_in", "mlp.fc_out"),
    ),
    "codegen": _gpt(
        lambda c: _learned_positions(c, qkv_bias=False, out_bias=False, parallel="one_norm"),
        "attn", ("qkv_proj",), "out_proj", ("mlp.fc_in", "mlp.fc_out"),
    ),
    "bloom": _gpt(
        _learned_positions, "self_attention", ("query_key_value",), "dense", ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        embeddings="word_embeddings", pruning_refused=_ADDS_INSIDE,
    ),
    "falcon": _gpt(
        lambda c: _layer_norm(
            c, parallel="one_norm", **dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), c.bias),
            **({"rotary_dim": 0} if c.alibi else {}),
        ),
        "self_attention", ("query_key_value",), "dense", ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        embeddings="word_embeddings",
    ),
    "mpt": _gpt(
        lambda c: _learned_positions(c, qkv_bias=False, out_bias=False, mlp_bias=False),
        "attn", ("Wqkv",), "out_proj", ("ffn.up_proj", "ffn.down_proj"), blocks="blocks", final_norm="norm_f",
        pruning_refused=_ADDS_INSIDE,
    ),
    "ctrl": _gpt(
        _learned_positions, "multi_head_attention", ("Wq", "Wk", "Wv"), "dense", ("ffn.0", "ffn.2"),
        final_norm="layernorm", embeddings="w",
        pruning_refused="its attention reads the residual three times",
    ),
    "opt": _row(
        _opt,
        stack="model.decoder",
        final_norm="final_layer_norm",
        projections=Projections(_QKV, "self_attn.out_proj", ("fc1",), "fc2"),
    ),
    "phi": _row(
        _phi,
        final_norm="final_layernorm",
        projections=Projections(_QKV, "self_attn.dense", ("mlp.fc1",), "mlp.fc2"),
    ),
    "persimmon": _row(
        _layer_norm,
        final_norm="final_layernorm",
        projections=Projections(
            ("self_attn.query_key_value",), "self_attn.dense", ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"
        ),
    ),
    **{
        name: _row(
            _gpt_neox,
            "attention",
            stack=name,
            final_norm="final_layer_norm",
            embeddings="embed_in",
            projections=Projections(
                ("attention.query_key_value",), "attention.dense", ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"
            ),
        )
        for name in ("gpt_neox", "gpt_neox_japanese")
    },
    "gpt_neox_japanese": _row(
        lambda c: _plain_mlp(c, norm="layer"),
        "attention",
        stack="gpt_neox_japanese",
        final_norm="final_layer_norm",
        embeddings="embed_in",
        projections=Projections(
            ("attention.query_key_value",), "attention.dense", ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"
        ),
    ),
    "biogpt": _row(
        _learned_positions, stack="biogpt", final_norm="layer_norm",
        projections=Projections(_QKV, "self_attn.out_proj", ("fc1",), "fc2"),
    ),
    "xglm": _row(
        _learned_positions, final_norm="layer_norm",
        projections=Projections(_QKV, "self_attn.out_proj", ("fc1",), "fc2"),
    ),
    "modernbert-decoder": _row(
        lambda c: block_spec(c, norm="layer"),
        "attn",
        final_norm="final_norm",
        embeddings="embeddings.tok_embeddings",
        projections=Projections(
            ("attn.q_proj", "attn.k_proj", "attn.v_proj"), "attn.Wo", ("mlp.Wi",), "mlp.Wo", mlp_stacked=2
        ),
    ),
    # encoders that can be decoders, and decoders of encoder-decoders
    **{
        name: _bert_row(stack)
        for name, stack in {
            "bert": "bert", "bert-generation": "bert", "big_bird": "bert", "megatron-bert": "bert",
            "camembert": "roberta", "roberta": "roberta", "xlm-roberta": "roberta", "xlm-roberta-xl": "roberta",
            "xmod": "roberta", "data2vec-text": "data2vec_text", "electra": "electra", "ernie": "ernie",
            "rembert": "rembert", "roberta-prelayernorm": "roberta_prelayernorm", "roc_bert": "roc_bert",
            "roformer": "roformer",
        }.items()
    },
    **_rows("bart blenderbot-small marian mvp plbart trocr", _bart_row(False, pruning_refused=_POST_NORM)),
    **_rows("bigbird_pegasus blenderbot mbart pegasus whisper", _bart_row(True, unpruned="the attention to an encoder")),
}  # fmt: skip

WRAPPERS: dict[str, str] = {
    **dict.fromkeys(
        [
            "aya_vision",
            "gemma3",
            "gemma4",
            "internvl",
            "llava",
            "mistral3",
            "paligemma",
            "qwen2_5_vl",
            "qwen2_vl",
            "qwen3_5",
            "qwen3_5_moe",
            "qwen3_vl",
            "qwen3_vl_moe",
        ],
        "model.language_model",
    ),
    **dict.fromkeys(("idefics3", "smolvlm"), "model.text_model"),
}
"""Path of the decoder stack in a model of text and images, by its type; the row is that of its text configuration."""
