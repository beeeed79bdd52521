"""Where a supported model keeps its embeddings, decoder blocks, final norm and head.

A method asks this module instead of walking a model by itself. The table is `hf_qst.base_model.decoder_table`; a user
adds a row to it with `register_architecture`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from hf_qst.base_model.architecture import Architecture, BlockSpec, Projections, SequentialBlock
from hf_qst.base_model.decoder_table import ARCHITECTURES, WRAPPERS
from hf_qst.base_model.experts import read_residual
from hf_qst.base_model.linear_layers import is_linear

__all__ = [
    "ARCHITECTURES",
    "WRAPPERS",
    "Architecture",
    "BlockSpec",
    "DecoderStack",
    "Projections",
    "SequentialBlock",
    "UnsupportedArchitectureError",
    "find_decoder_stack",
    "register_architecture",
]

# Layer types of transformers' configurations whose blocks attend to all positions before, or to the last of them.
_WHOLE = ("full_attention", "indexed_attention", "hybrid")
_WINDOWED = ("sliding_attention", "chunked_attention", "hybrid_sliding")


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
        return self.module.get_submodule(self.architecture.blocks)

    @property
    def embeddings(self) -> nn.Module:
        return self.module.get_submodule(self.architecture.embeddings)

    @property
    def final_norm(self) -> nn.Module | None:
        return getattr(self.module, self.architecture.final_norm, None)

    def projections(self, block: nn.Module) -> Projections:
        """The layers of this block that read from the residual or add to it, as far as they are known."""
        names = self.architecture.projections_of(block)
        if names.experts and not read_residual(block.get_submodule(names.experts), self.spec.hidden_size):
            names = replace(names, experts="")
        return names

    def attention_sources(self) -> list[int]:
        """For each block, the block whose attention mask and positions a causal attention there can use.

        It is the block itself if it has attention. Otherwise (a convolution, a recurrence, no mixer) it is the first
        block that attends to all positions, or if none does the first that attends to some.

        Raises:
            UnsupportedArchitectureError: no block has an attention whose mask is a causal one.
        """
        count = len(self.blocks)
        types = getattr(self.module.config, "layer_types", None) or []
        if len(types) != count:
            present = [self.architecture.attention in dict(block.named_modules()) for block in self.blocks]
            types = ["full_attention" if attends else "none" for attends in present]
        whole = [i for i, kind in enumerate(types) if kind in _WHOLE]
        some = whole or [i for i, kind in enumerate(types) if kind in _WINDOWED]
        if not some:
            raise UnsupportedArchitectureError(
                f"a model of type {self.model_type!r} with layers of the types {', '.join(sorted(set(types)))} has no "
                f"attention whose mask a side network could use; one of {', '.join(_WHOLE + _WINDOWED)} is needed"
            )
        # A block that reads the keys and values of another has none in a cache; the first of its type has.
        shared = getattr(self.module.config, "kv_sharing_modes", None) or [None] * count
        own = [i if kind in _WHOLE + _WINDOWED else some[0] for i, kind in enumerate(types)]
        return [types.index(types[i]) if shared[i] == "reuse" else i for i in own]


def register_architecture(model_type: str, row: Architecture | str) -> None:
    """Add a type of decoder to the table, or replace one.

    Args:
        model_type (`str`): `config.model_type` of its text configuration.
        row ([`Architecture`] or `str`): what its parts are called, or the name of a known type that calls them the same.

    Raises:
        ValueError: `row` is the name of no known type.
        TypeError: `row` is something else.
    """
    if isinstance(row, str):
        if row not in ARCHITECTURES:
            raise ValueError(f"register_architecture: row must be a known type or an Architecture, got {row!r}")
        row = ARCHITECTURES[row]
    if not isinstance(row, Architecture):
        raise TypeError(f"register_architecture: row must be an Architecture or a known type, got {type(row).__name__}")
    ARCHITECTURES[model_type] = row


def _refuse(model, reason: str) -> None:
    raise UnsupportedArchitectureError(
        f"{type(model).__name__} is not supported: {reason}. Supported are decoder-only models of the "
        f"{len(ARCHITECTURES) + len(WRAPPERS)} types that hf_qst.supported_models() names, with their language-model or "
        "classification head."
    )


def text_config(config):
    """The configuration of the language model in a model of text and images; of any other its own."""
    return config.get_text_config(decoder=True)


def stack_path(config) -> str | None:
    """Path of the decoder stack inside a model with a head and this configuration; None for an unknown type."""
    row = ARCHITECTURES.get(text_config(config).model_type)
    if row is None:
        return None
    return WRAPPERS.get(config.model_type, row.stack)


def find_decoder_stack(model: nn.Module) -> DecoderStack:
    """Find the decoder stack of a transformers model with a head.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A causal language model or classifier of one of the types in `ARCHITECTURES`, or a model of text and images
            around one (`WRAPPERS`). Its stack may already be wrapped by a PEFT layer.

    Raises:
        UnsupportedArchitectureError: an encoder-decoder, an unknown type, a bare stack without a head, or a stack
            without blocks. The message names the class, and of an unknown type what was found in its blocks.
    """
    config = getattr(model, "config", None)
    if config is None:
        _refuse(model, "it has no transformers config")
    if getattr(config, "is_encoder_decoder", False):
        _refuse(model, "it is an encoder-decoder")
    text = text_config(config)
    architecture, path = ARCHITECTURES.get(text.model_type), stack_path(config)
    if architecture is None:
        _refuse(model, f"its config.model_type is {text.model_type!r}{_found(model)}")
    if architecture.decoder_flag and not text.is_decoder:
        _refuse(model, f"a model of type {text.model_type!r} is an encoder unless its config says is_decoder=True")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        _refuse(model, f"it has no {path!r} (a bare decoder stack has no head to tune for)")
    module = getattr(module, "base_layer", module)
    blocks = dict(module.named_modules()).get(architecture.blocks)
    if blocks is None or len(blocks) == 0:
        _refuse(model, f"its {path}.{architecture.blocks} holds no decoder blocks")
    output_size = getattr(text, "word_embed_proj_dim", None) or text.hidden_size
    spec = architecture.spec(text.per_layer_config[0])
    return DecoderStack(text.model_type, path, module, architecture, spec, output_size)


def _found(model: nn.Module) -> str:
    """What an unknown model's first block holds, and the known types whose rows would fit it."""
    lists = {
        path: module[0]
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 0 and "expert" not in path
    }
    if not lists:
        return ""
    path, block = next(iter(lists.items()))
    parts = {name: type(part).__name__ for name, part in block.named_children()}
    text = f", and a block in {path!r} has " + ", ".join(f"{name} ({kind})" for name, kind in parts.items())
    known = dict(block.named_modules())
    fits = [
        name
        for name, row in ARCHITECTURES.items()
        if f"{row.stack}.{row.blocks}" == path
        and row.attention in known
        and all(is_linear(known.get(layer)) for layer in row.projections.paths)
    ]
    if not fits:
        return f"{text}; no known type calls its parts so (hf_qst.register_architecture takes a row of your own)"
    kind = text_config(model.config).model_type
    return f"{text}, as models of type {fits[0]!r} do: try hf_qst.register_architecture({kind!r}, {fits[0]!r})"
