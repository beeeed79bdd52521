"""The table of decoder architectures: one row a model type, and the wrappers of text and images around them.

To support another architecture, add a row here and, if its smallest configuration needs more than widths, a line to
`tests/architectures.py`. What a row can say is in `hf_qst.base_model.architecture`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from hf_qst.base_model import block_specs as specs
from hf_qst.base_model.architecture import (
    Architecture,
    Projections,
    SequentialBlock,
    block_spec,
    first_of,
    first_stream,
    mean_of_streams,
    mixture,
)

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATED = ("mlp.gate_proj", "mlp.up_proj")
_SPLIT = Projections(_QKV, "self_attn.o_proj", _GATED, "mlp.down_proj")
_MLP = Projections((), None, _GATED, "mlp.down_proj")
_PLAIN_MLP = Projections(_QKV, "self_attn.o_proj", ("mlp.up_proj",), "mlp.down_proj")
_FUSED_MLP = Projections(_QKV, "self_attn.o_proj", ("mlp.gate_up_proj",), "mlp.down_proj", mlp_stacked=2)
_FUSED = replace(_FUSED_MLP, attention_in=("self_attn.qkv_proj",))
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

_NEVER_CALLED = "a language model alone never calls it"
_EXPERTS = "the experts and their router"
_ROUTER = "the router"
_SHARED = "the router and the middle of the shared expert"
_POST_NORM = "a norm after the addition mixes pruned and kept channels"
_STREAMS = "what mixes its residual streams reads all of their channels"
_SHARED_WEIGHTS = "its blocks of attention share their weights"
_ADDS_INSIDE = "its layers add to the residual themselves, where pruned channels have no place"


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
    return _row(specs.bert, "attention", **{**names, **changes})


def _bart_row(pre_norm: bool, **changes) -> Architecture:
    """The decoder of an encoder-decoder, alone."""
    names = {
        "stack": "model.decoder", "final_norm": "layer_norm", "uncompressed": {"encoder_attn": _NEVER_CALLED},
        "projections": Projections(_QKV, "self_attn.out_proj", ("fc1",), "fc2"),
    }  # fmt: skip
    return _row(lambda c: specs.learned_positions(c, pre_norm=pre_norm), **{**names, **changes})


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
    "qwen2": _row(specs.qwen2, sequential=SequentialBlock("Qwen2DecoderLayer")),
    "qwen3": _row(specs.qk_norm, sequential=SequentialBlock("Qwen3DecoderLayer")),
    **_rows(
        "arcee cwm diffllama exaone4 gemma helium hunyuan_v1_dense hyperclovax internlm3 iquestcoder ministral "
        "ministral3 olmo olmo2 olmo3 seed_oss smollm3 vaultgemma",
        _row(),
    ),
    "bitnet": _row(
        projections=Projections(_QKV, "self_attn.o_proj"), unpruned="the MLP with its norm over the middle channels"
    ),
    "arcee": _row(specs.plain_mlp, projections=_PLAIN_MLP),
    "apertus": _row(specs.plain_mlp, projections=_PLAIN_MLP),
    "nanochat": _row(specs.plain_mlp, projections=Projections(_QKV, "self_attn.o_proj", ("mlp.fc1",), "mlp.fc2")),
    "nemotron": _row(lambda c: specs.plain_mlp(c, norm="layer"), projections=_PLAIN_MLP),
    "jais2": _row(specs.layer_norm, projections=_PLAIN_MLP),
    "stablelm": _row(lambda c: block_spec(c, norm="layer", qkv_bias=c.use_qkv_bias)),
    "starcoder2": _row(
        lambda c: specs.layer_norm(c, **dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), c.use_bias)),
        projections=Projections(_QKV, "self_attn.o_proj", ("mlp.c_fc",), "mlp.c_proj"),
    ),
    "ernie4_5": _row(),
    "gemma2": _row(specs.gemma),
    "gemma3_text": _row(lambda c: specs.gemma(c, qk_norm=True)),
    "gemma3n_text": _row(
        lambda c: specs.gemma(c, qk_norm=True),
        state=first_stream,
        alternatives=_SHARED_KV,
        unpruned="the mixing of residual streams",
    ),
    **_rows(
        "gemma4_text gemma4_unified_text",
        _row(
            lambda c: specs.gemma(c, qk_norm=True),
            projections=replace(_SPLIT, experts="experts"),
            alternatives=(_SPLIT, *_SHARED_KV),
            unpruned="the router, the middle of the MLP beside the experts, the embeddings of a block",
        ),
    ),
    "granite": _row(logit_multiplier=_LOGITS_SCALING),
    "granite_swa": _row(logit_multiplier=_LOGITS_SCALING),
    **_rows("cohere cohere2", _row(specs.cohere, logit_multiplier=_LOGIT_SCALE)),
    "cohere_compass_text": _row(lambda c: specs.cohere(c, rotary="halved"), logit_multiplier=_LOGIT_SCALE),
    "phi3": _row(projections=_FUSED),
    "phi4_multimodal": _row(projections=_FUSED, uncompressed={"embed_tokens_extend": "text alone does not reach it"}),
    "glm": _row(projections=_FUSED_MLP),
    "glm4": _row(lambda c: block_spec(c, post_norms=True), projections=_FUSED_MLP),
    "minicpm3": _row(
        specs.latent,
        projections=_LATENT,
        logit_multiplier=lambda c: first_of(c, ("dim_model_base",), c.hidden_size) / c.hidden_size,
    ),
    "youtu": _row(specs.latent, projections=_LATENT, alternatives=(_LATENT_PLAIN_QUERIES,)),
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
    "gpt_oss": _moe(specs.half),
    "cohere2_moe": _moe(specs.cohere, logit_multiplier=_LOGIT_SCALE),
    **_rows("granitemoe granitemoe_swa", _moe(host="block_sparse_moe", logit_multiplier=_LOGITS_SCALING)),
    "granitemoeshared": _moe(
        host="block_sparse_moe", projections=_GRANITE, unpruned=_SHARED, logit_multiplier=_LOGITS_SCALING
    ),
    **_rows(
        "axk1 deepseek_v3 glm4_moe_lite",
        _moe(specs.latent, projections=_LATENT, alternatives=(_LATENT_PLAIN_QUERIES,), unpruned=_SHARED),
    ),
    **_rows(
        "axk2 deepseek_v32 glm_moe_dsa",
        _row(specs.latent, projections=_LATENT, pruning_refused="its choice of tokens is read from outside of the attention"),
    ),
    "dots3_note_text": _row(
        specs.latent, projections=Projections(), pruning_refused="an indexer inside its attention reads the residual too",
        uncompressed={"audio_tower": "images and text do not reach it"},
    ),
    # hyper-connections: several residual streams, mixed around each half of a block
    "deepseek_v4": _row(
        specs.half, projections=Projections(), state=mean_of_streams, positions="position_embeddings.main",
        pruning_refused=_STREAMS, uncompressed={"o_a_proj": "it has a matrix for each group of heads"},
    ),
    "hy_v4": _row(specs.latent, projections=Projections(), state=mean_of_streams, pruning_refused=_STREAMS),
    "qwen4_exp_text": _row(
        specs.qk_norm, projections=Projections(), state=mean_of_streams, pruning_refused=_STREAMS, final_norm="none"
    ),
    "longcat_flash": _row(
        specs.latent, projections=Projections(), pruning_refused="a block has two attentions", uncompressed={r"router\.classifier": _NEVER_CALLED}
    ),
    "deepseek_v2": _moe(
        lambda c: specs.latent(c, rotary="complex"),
        projections=_LATENT,
        alternatives=(_LATENT_PLAIN_QUERIES,),
        unpruned=_SHARED,
    ),
    "llama4_text": _row(
        specs.complex,
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
    **_rows("qwen2_vl_text qwen2_5_vl_text", _row(specs.qwen2)),
    "qwen3_vl_text": _row(specs.qk_norm),
    "emu3_text_model": _row(),
    # hybrids of attention and something else
    **_rows("qwen3_5_moe_text qwen3_next", _moe(specs.qk_norm, unpruned=_SHARED, **_DELTA)),
    "qwen3_5_text": _row(specs.qk_norm, **_DELTA),
    "olmo_hybrid": _row(
        specs.qk_norm,
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
        specs.no_positions, "feed_forward", final_norm="final_layernorm", projections=_FEED_FORWARD, alternatives=(_MAMBA,),
        uncompressed={"dt_proj": _NEVER_CALLED},
    ),
    "falcon_h1": _row(
        final_norm="final_layernorm",
        projections=_FEED_FORWARD,
        logit_multiplier=lambda c: first_of(c, ("lm_head_multiplier",), 1.0),
    ),
    "granitemoehybrid": _moe(
        specs.no_positions,
        "block_sparse_moe",
        projections=_GRANITE,
        alternatives=(_GRANITE_SHARED, _MAMBA),
        unpruned=_SHARED,
        logit_multiplier=_LOGITS_SCALING,
    ),
    "inkling_text": _moe(
        specs.no_positions,
        projections=Projections((*_QKV, "self_attn.r_proj"), "self_attn.o_proj", _GATED, "mlp.down_proj"),
        logit_multiplier=lambda c: 1 / c.logits_mup_width_multiplier,
        unpruned=_SHARED,
    ),
    "inkling2_text": _row(
        specs.no_positions, projections=Projections(), pruning_refused="its blocks read the states of earlier ones, not a residual"
    ),
    "zaya": _row(
        projections=Projections((), "self_attn.o_proj"), mask="attention_mask.causal",
        pruning_refused="its attention reads the residual through convolutions",
    ),
    "zamba": _row(
        specs.no_positions, "shared_transf.self_attn", final_norm="final_layernorm", projections=Projections(),
        mask="causal_mask", pruning_refused=_SHARED_WEIGHTS, uncompressed={r"shared_transf\.": _SHARED_WEIGHTS},
    ),
    "zamba2": _row(
        lambda c: block_spec(c, **({} if c.use_mem_rope else {"rotary_dim": 0})), "shared_transformer.self_attn",
        final_norm="final_layernorm", projections=Projections(), mask="causal_mask", pruning_refused=_SHARED_WEIGHTS,
        uncompressed={r"shared_transformer\.": _SHARED_WEIGHTS},
    ),
    "moshi": _row(
        lambda c: specs.no_positions(c, intermediate_size=c.ffn_dim // 2),
        projections=Projections((), None, ("mlp.fc1",), "mlp.fc2", mlp_stacked=2), unpruned="the attention",
    ),
    "bailing_hybrid": _moe(specs.latent, projections=_MLP, unpruned=f"the attention, {_SHARED}"),
    "kimi_linear": _moe(specs.no_positions, projections=_MLP, unpruned=f"the attention, {_SHARED}"),
    "nemotron_h": _moe(
        specs.no_positions, "mixer", attention="mixer", embeddings="embeddings", final_norm="norm_f",
        projections=Projections(
            ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"), "mixer.o_proj", ("mixer.up_proj",), "mixer.down_proj"
        ),
        alternatives=(Projections(("mixer.in_proj",), "mixer.out_proj"),), unpruned=_SHARED,
    ),
    "recurrent_gemma": _row(
        specs.no_positions,
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
    "gpt2": _gpt(specs.gpt2, "attn", ("c_attn",), "c_proj", ("mlp.c_fc", "mlp.c_proj")),
    "gpt-sw3": _gpt(specs.gpt2, "attn", ("c_attn",), "c_proj", ("mlp.c_fc", "mlp.c_proj")),
    "gpt_bigcode": _gpt(specs.gpt2, "attn", ("c_attn",), "c_proj", ("mlp.c_fc", "mlp.c_proj")),
    "openai-gpt": _gpt(
        lambda c: specs.gpt2(c), "attn", ("c_attn",), "c_proj", ("mlp.c_fc", "mlp.c_proj"),
        final_norm="none", embeddings="tokens_embed", pruning_refused=_POST_NORM,
    ),
    "gpt_neo": _gpt(specs.learned_positions, "attn.attention", ("q_proj", "k_proj", "v_proj"), "out_proj", ("mlp.c_fc", "mlp.c_proj")),
    "gptj": _gpt(
        lambda c: specs.learned_positions(c, qkv_bias=False, out_bias=False, parallel="one_norm"),
        "attn", ("q_proj", "k_proj", "v_proj"), "out_proj", ("mlp.fc_in", "mlp.fc_out"),
    ),
    "codegen": _gpt(
        lambda c: specs.learned_positions(c, qkv_bias=False, out_bias=False, parallel="one_norm"),
        "attn", ("qkv_proj",), "out_proj", ("mlp.fc_in", "mlp.fc_out"),
    ),
    "bloom": _gpt(
        specs.learned_positions, "self_attention", ("query_key_value",), "dense", ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        embeddings="word_embeddings", pruning_refused=_ADDS_INSIDE,
    ),
    "falcon": _gpt(
        lambda c: specs.layer_norm(
            c, parallel="one_norm", **dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), c.bias),
            **({"rotary_dim": 0} if c.alibi else {}),
        ),
        "self_attention", ("query_key_value",), "dense", ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        embeddings="word_embeddings",
    ),
    "mpt": _gpt(
        lambda c: specs.learned_positions(c, qkv_bias=False, out_bias=False, mlp_bias=False),
        "attn", ("Wqkv",), "out_proj", ("ffn.up_proj", "ffn.down_proj"), blocks="blocks", final_norm="norm_f",
        pruning_refused=_ADDS_INSIDE, mask_hides=True,
    ),
    "ctrl": _gpt(
        specs.learned_positions, "multi_head_attention", ("Wq", "Wk", "Wv"), "dense", ("ffn.0", "ffn.2"),
        final_norm="layernorm", embeddings="w",
        pruning_refused="its attention reads the residual three times",
    ),
    "opt": _row(
        specs.opt,
        stack="model.decoder",
        final_norm="final_layer_norm",
        projections=Projections(_QKV, "self_attn.out_proj", ("fc1",), "fc2"),
    ),
    "phi": _row(
        specs.phi,
        final_norm="final_layernorm",
        projections=Projections(_QKV, "self_attn.dense", ("mlp.fc1",), "mlp.fc2"),
    ),
    "persimmon": _row(
        specs.layer_norm,
        final_norm="final_layernorm",
        projections=Projections(
            ("self_attn.query_key_value",), "self_attn.dense", ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"
        ),
    ),
    **{
        name: _row(
            specs.gpt_neox,
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
        lambda c: specs.plain_mlp(c, norm="layer"),
        "attention",
        stack="gpt_neox_japanese",
        final_norm="final_layer_norm",
        embeddings="embed_in",
        projections=Projections(
            ("attention.query_key_value",), "attention.dense", ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"
        ),
    ),
    "biogpt": _row(
        specs.learned_positions, stack="biogpt", final_norm="layer_norm",
        projections=Projections(_QKV, "self_attn.out_proj", ("fc1",), "fc2"),
    ),
    "xglm": _row(
        specs.learned_positions, final_norm="layer_norm",
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
            "dots3_note",
            "fuyu",
            "gemma3",
            "gemma3n",
            "gemma4",
            "gemma4_unified",
            "got_ocr2",
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
            "qwen4_exp",
        ],
        "model.language_model",
    ),
    **dict.fromkeys(("emu3", "idefics3", "smolvlm"), "model.text_model"),
    "llama4": "language_model.model",
}
"""Path of the decoder stack in a model of text and images, by its type; the row is that of its text configuration."""
