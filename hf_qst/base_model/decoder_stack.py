"""Where a supported model keeps its embeddings, decoder blocks, final norm and head.

One row a model type; a method asks this module instead of walking a model by itself. To support another architecture,
add a row to `ARCHITECTURES` and a tiny config of it to `tests/architectures.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class BlockSpec:
    """What one decoder block of the base looks like, as far as a block of another width must follow it.

    Widths are the base's own; `rotary_dim` is the number of channels of a head that are rotated (0: none).
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm: str  # "rms" or "layer"
    norm_eps: float
    activation: str
    gated_mlp: bool
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    rotary_dim: int = 0
    qk_norm: bool = False  # a norm of the same kind over each query and key head
    post_norms: bool = False  # Gemma 2/3: a second norm on each branch's output
    parallel: str | None = None  # None, "one_norm" (Phi) or "two_norms" (GPT-NeoX)
    pre_norm: bool = True  # a branch reads the normalised residual and adds to the plain one
    attention_dropout: float = 0.0


@dataclass(frozen=True)
class Projections:
    """Paths inside a block of the linear layers that read from the residual and of those that add to it."""

    attention_in: tuple[str, ...]
    attention_out: str
    mlp_in: tuple[str, ...]
    mlp_out: str

    @property
    def paths(self) -> tuple[str, ...]:
        """All of them: the matrices of a block."""
        return *self.attention_in, self.attention_out, *self.mlp_in, self.mlp_out


_SPLIT = Projections(
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj",
    ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj",
)


@dataclass(frozen=True)
class SequentialBlock:
    """A block that is `h = h + attention(norm_1(h))`, then `h = h + mlp(norm_2(h))`, with RMSNorm and nothing in between.

    Kernels may compute the norms and additions of such blocks. Not one is a block with a norm on a branch's output
    (Gemma), one addition for both branches (Phi, GPT-NeoX), dropout before it (GPT-2, OPT) or `Conv1D` (GPT-2).
    """

    block: str  # its class in `transformers.models.<model type>.modeling_<model type>`
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class Architecture:
    """One row of the table: the names a model class gives to its parts.

    `stack` is the path of the decoder stack inside a model with a head, the other names are relative to it (`blocks`,
    `final_norm`, `embeddings`) or to a block (`attention`, `mlp`, those of `projections`).
    """

    stack: str
    blocks: str
    final_norm: str
    embeddings: str
    attention: str
    mlp: tuple[str, ...]
    projections: Projections
    spec: Callable[[object], BlockSpec]
    sequential: SequentialBlock | None = None


def _rotary_dim(config, head_dim: int) -> int:
    parameters = config.rope_parameters or {}
    # Gemma 3 keeps one set of rotary parameters for each layer type; both rotate the whole head.
    return int(head_dim * parameters.get("partial_rotary_factor", 1.0))


def _llama_like(config, **changes) -> BlockSpec:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "head_dim": head_dim,
        "norm": "rms",
        "norm_eps": getattr(config, "rms_norm_eps", 0.0),
        "activation": getattr(config, "hidden_act", "silu"),
        "gated_mlp": True,
        "qkv_bias": getattr(config, "attention_bias", False),
        "out_bias": getattr(config, "attention_bias", False),
        "mlp_bias": getattr(config, "mlp_bias", False),
        "rotary_dim": _rotary_dim(config, head_dim),
        "attention_dropout": getattr(config, "attention_dropout", 0.0),
    }
    return BlockSpec(**{**values, **changes})


def _gemma(config, **changes) -> BlockSpec:
    return _llama_like(config, activation=config.hidden_activation, post_norms=True, **changes)


def _opt(config) -> BlockSpec:
    return BlockSpec(
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_dim,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        norm="layer",
        norm_eps=1e-5,
        activation=config.activation_function,
        gated_mlp=False,
        qkv_bias=config.enable_bias,
        out_bias=config.enable_bias,
        mlp_bias=config.enable_bias,
        pre_norm=config.do_layer_norm_before,
        attention_dropout=config.attention_dropout,
    )


def _gpt2(config) -> BlockSpec:
    return BlockSpec(
        hidden_size=config.hidden_size,
        intermediate_size=config.n_inner if config.n_inner is not None else 4 * config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        norm="layer",
        norm_eps=config.layer_norm_epsilon,
        activation=config.activation_function,
        gated_mlp=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        attention_dropout=config.attn_pdrop,
    )


def _phi(config) -> BlockSpec:
    return _llama_like(
        config,
        norm="layer",
        norm_eps=config.layer_norm_eps,
        gated_mlp=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        qk_norm=config.qk_layernorm,
        parallel="one_norm",
    )


def _gpt_neox(config) -> BlockSpec:
    return _llama_like(
        config,
        norm="layer",
        norm_eps=config.layer_norm_eps,
        gated_mlp=False,
        mlp_bias=True,
        parallel="two_norms" if config.use_parallel_residual else None,
    )


def _decoder(spec: Callable, attention: str = "self_attn", **changes) -> Architecture:
    names = {
        "stack": "model",
        "blocks": "layers",
        "final_norm": "norm",
        "embeddings": "embed_tokens",
        "mlp": ("mlp",),
        "projections": _SPLIT,
    }
    return Architecture(attention=attention, spec=spec, **{**names, **changes})


ARCHITECTURES: dict[str, Architecture] = {
    "llama": _decoder(_llama_like, sequential=SequentialBlock("LlamaDecoderLayer")),
    "mistral": _decoder(_llama_like, sequential=SequentialBlock("MistralDecoderLayer")),
    "qwen2": _decoder(
        lambda c: _llama_like(c, qkv_bias=True, out_bias=False), sequential=SequentialBlock("Qwen2DecoderLayer")
    ),
    "qwen3": _decoder(lambda c: _llama_like(c, qk_norm=True), sequential=SequentialBlock("Qwen3DecoderLayer")),
    "gemma2": _decoder(_gemma),
    "gemma3_text": _decoder(lambda c: _gemma(c, qk_norm=True)),
    "opt": _decoder(
        _opt,
        stack="model.decoder",
        final_norm="final_layer_norm",
        mlp=("fc1", "fc2"),
        projections=Projections(_SPLIT.attention_in, "self_attn.out_proj", ("fc1",), "fc2"),
    ),
    "gpt2": _decoder(
        _gpt2,
        "attn",
        stack="transformer",
        blocks="h",
        final_norm="ln_f",
        embeddings="wte",
        projections=Projections(("attn.c_attn",), "attn.c_proj", ("mlp.c_fc",), "mlp.c_proj"),
    ),
    "phi": _decoder(
        _phi,
        final_norm="final_layernorm",
        projections=Projections(_SPLIT.attention_in, "self_attn.dense", ("mlp.fc1",), "mlp.fc2"),
    ),
    "gpt_neox": _decoder(
        _gpt_neox,
        "attention",
        stack="gpt_neox",
        final_norm="final_layer_norm",
        embeddings="embed_in",
        projections=Projections(
            ("attention.query_key_value",), "attention.dense", ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"
        ),
    ),
}


class UnsupportedArchitectureError(ValueError):
    """The model is none of those in `ARCHITECTURES`."""


@dataclass(frozen=True)
class DecoderStack:
    """The parts of one model, as `find_decoder_stack` found them."""

    model_type: str
    path: str  # of the stack inside the model
    module: nn.Module
    architecture: Architecture
    spec: BlockSpec
    output_size: int  # width of the stack's output, which is the head's input

    @property
    def blocks(self) -> nn.ModuleList:
        return getattr(self.module, self.architecture.blocks)

    @property
    def embeddings(self) -> nn.Module:
        return getattr(self.module, self.architecture.embeddings)

    @property
    def final_norm(self) -> nn.Module | None:
        return getattr(self.module, self.architecture.final_norm)


def _refuse(model, reason: str) -> None:
    raise UnsupportedArchitectureError(
        f"{type(model).__name__} is not supported: {reason}. Supported are decoder-only models of the types "
        f"{', '.join(sorted(ARCHITECTURES))}, with their language-model or classification head."
    )


def find_decoder_stack(model: nn.Module) -> DecoderStack:
    """Find the decoder stack of a transformers model with a head.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A causal language model or classifier of one of the types in `ARCHITECTURES`. Its stack may already be
            wrapped by a PEFT layer.

    Raises:
        UnsupportedArchitectureError: an encoder-decoder, an unknown type, a bare stack without a head, or a stack
            without blocks. The message names the class and the supported types.
    """
    config = getattr(model, "config", None)
    if config is None:
        _refuse(model, "it has no transformers config")
    if getattr(config, "is_encoder_decoder", False):
        _refuse(model, "it is an encoder-decoder")
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        _refuse(model, f"its config.model_type is {config.model_type!r}")
    try:
        module = model.get_submodule(architecture.stack)
    except AttributeError:
        _refuse(model, f"it has no {architecture.stack!r} (a bare decoder stack has no head to tune for)")
    module = getattr(module, "base_layer", module)
    blocks = getattr(module, architecture.blocks, None)
    if blocks is None or len(blocks) == 0:
        _refuse(model, f"its {architecture.stack}.{architecture.blocks} holds no decoder blocks")
    output_size = getattr(config, "word_embed_proj_dim", None) or config.hidden_size
    spec = architecture.spec(config)
    return DecoderStack(config.model_type, architecture.stack, module, architecture, spec, output_size)
