"""What a GGUF file says of each type of model, and what it cannot say.

Names and values are those that llama.cpp's converter writes. llama.cpp has the rest of an architecture in its code: the
activation, which matrices have a bias, which layers see a window alone. A model that differs there is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Settings = dict[str, Any]


class GGUFError(ValueError):
    """A model or a tokenizer that a GGUF file cannot hold, or a file that read back as another model."""


@dataclass(frozen=True)
class Architecture:
    """A type of model in GGUF files.

    Args:
        name (`str`): in the file.
        settings (`Callable`): of a configuration: keys of the file below the name, beside those that all types have.
        implied (`Callable`): of a configuration: its fields that no key holds -> the value that llama.cpp takes.
        unread (`tuple[str, ...]`): fields that the file holds or llama.cpp implies, and transformers does not read.
        interleaved_heads (`bool`): rows of queries and keys are in llama.cpp's order, pairs of a rotation side by side.
        shifted_norms (`bool`): the weights of norms are stored with 1 added.
        rms_norm (`bool`): the norms have no mean.
    """

    name: str
    settings: Callable[[Any], Settings] = lambda config: {}
    implied: Callable[[Any], Settings] = lambda config: {}
    unread: tuple[str, ...] = field(default=("rope_parameters",))
    interleaved_heads: bool = False
    shifted_norms: bool = False
    rms_norm: bool = True


def head_width(config) -> int:
    """Channels of a head of attention."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def common_settings(config, architecture: Architecture) -> Settings:
    """The keys that every type has."""
    width = head_width(config)
    epsilon = next(
        value
        for name in ("rms_norm_eps", "norm_epsilon", "layer_norm_epsilon", "layer_norm_eps")
        if (value := getattr(config, name, None)) is not None
    )
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    norm = "layer_norm_rms_epsilon" if architecture.rms_norm else "layer_norm_epsilon"
    return {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": inner,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "attention.key_length": width,
        "attention.value_length": width,
        f"attention.{norm}": epsilon,
        "vocab_size": config.vocab_size,
    }


def check_implied(config, architecture: Architecture) -> None:
    """Refuse a configuration with a field that the file cannot say.

    Raises:
        GGUFError: naming the first such field, its value, and the one that llama.cpp takes.
    """
    for name, value in {"sliding_window": None, **architecture.implied(config)}.items():
        found = getattr(config, name, value)
        if found != value:
            raise GGUFError(
                f"config.{name} is {found!r}; a GGUF file of the architecture {architecture.name} cannot say that, and "
                f"llama.cpp takes {value!r}"
            )


def _llama(config) -> Settings:
    return {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


def _query_scale(config) -> float:
    """Gemma's 27B is the one size whose queries are not scaled by the width of a head."""
    wide = config.num_hidden_layers in (46, 62)
    return config.hidden_size // config.num_attention_heads if wide else head_width(config)


def _gemma(config, period: int) -> Settings:
    """The last layer of each `period` sees all tokens, the others a window."""
    layers = range(1, config.num_hidden_layers + 1)
    return {
        "sliding_window": config.sliding_window,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": _query_scale(config),
        "layer_types": ["sliding_attention" if layer % period else "full_attention" for layer in layers],
    }


def _gemma2_settings(config) -> Settings:
    return {
        "attn_logit_softcapping": config.attn_logit_softcapping or 0.0,
        "final_logit_softcapping": config.final_logit_softcapping or 0.0,
        "attention.sliding_window": config.sliding_window,
    }


_GEMMA_UNREAD = ("rope_parameters", "layer_types", "query_pre_attn_scalar", "final_logit_softcapping")

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", implied=_llama, interleaved_heads=True),
    # Without a window it is a Llama, and reads back as one.
    "mistral": Architecture("llama", implied=lambda config: {"hidden_act": "silu"}, interleaved_heads=True),
    "qwen2": Architecture("qwen2", implied=lambda config: {"hidden_act": "silu"}),
    "qwen3": Architecture(
        "qwen3",
        implied=lambda config: {"hidden_act": "silu", "attention_bias": False},
        unread=("rope_parameters", "head_dim"),
    ),
    "phi3": Architecture(
        "phi3", implied=lambda config: {"hidden_act": "silu"}, unread=("rope_parameters", "partial_rotary_factor")
    ),
    "gemma2": Architecture(
        "gemma2",
        settings=_gemma2_settings,
        implied=lambda config: _gemma(config, 2),
        unread=(*_GEMMA_UNREAD, "attn_logit_softcapping"),
        shifted_norms=True,
    ),
    "gemma3_text": Architecture(
        "gemma3",
        settings=lambda config: {"attention.sliding_window": config.sliding_window},
        implied=lambda config: {
            **_gemma(config, 6),
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "use_bidirectional_attention": False,
        },
        unread=_GEMMA_UNREAD,
        shifted_norms=True,
    ),
    "starcoder2": Architecture(
        "starcoder2",
        implied=lambda config: {"hidden_act": "gelu_pytorch_tanh", "use_bias": True},
        rms_norm=False,
    ),
    "gpt2": Architecture(
        "gpt2",
        implied=lambda config: {
            "activation_function": "gelu_new",
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        unread=("n_positions", "n_inner"),
        rms_norm=False,
    ),
}
"""By transformers' model type."""
