"""Where a model keeps its blocks, and which linear layers in them are no maps of the blocks' inputs.

Decoder-only language models are also in `hf_qst.base_model.decoder_stack`. To support another model, add a row to `MODELS`
and a tiny one of it to the tests.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel

from hf_qst.base_model.decoder_stack import ARCHITECTURES, WRAPPERS, stack_path, text_config


@dataclass(frozen=True)
class Blocks:
    """One row: what is special about the blocks of a model type.

    Args:
        paths: of the lists of blocks inside the base model, where transformers does not mark the blocks by their class.
        without: layers inside the blocks that stay as they are, as regular expressions of the ends of their names, and why.
    """

    paths: tuple[str, ...] = ()
    without: Mapping[str, str] = field(default_factory=dict)


_BUCKETS = "reads relative positions, not hidden states: the same few rows in every call"
_DEBERTA = {r"pos_\w*proj": _BUCKETS}

# Models whose blocks are found, besides the rows of `ARCHITECTURES`: encoders, vision, and recurrences without attention.
MODELS: dict[str, Blocks] = {
    **dict.fromkeys(
        (
            "bart", "beit", "bert", "clip", "clip_text_model", "clip_vision_model", "deit", "dinov2", "dinov3_vit",
            "distilbert", "electra", "eurobert", "hubert", "modernbert", "roberta", "segformer", "siglip",
            "siglip_vision_model", "swin", "t5", "vit", "wav2vec2", "whisper", "xlm-roberta",
        ),
        Blocks(),
    ),
    "convnext": Blocks(paths=("encoder.stages",)),
    "deberta": Blocks(without=_DEBERTA),
    "deberta-v2": Blocks(without=_DEBERTA),
    **dict.fromkeys(("falcon_mamba", "mamba"), Blocks(without={"dt_proj": "has its weight read past the layer"})),
    **dict.fromkeys(("mamba2", "rwkv"), Blocks()),
    "mpnet": Blocks(paths=("encoder.layer",)),
    "swinv2": Blocks(without={r"continuous_position_bias_mlp\.\d+": _BUCKETS}),
}  # fmt: skip


def known_types() -> list[str]:
    """Model types whose blocks are known."""
    return sorted({*ARCHITECTURES, *WRAPPERS, *MODELS})


def find_blocks(model: nn.Module) -> tuple[str, ...]:
    """Paths of the lists of a model's transformer blocks, with a head or without; none for a model of no known type.

    A `PeftModel` is no known type either.
    """
    if not isinstance(model, PreTrainedModel) or model.config.model_type not in known_types():
        return ()
    row = MODELS.get(model.config.model_type, Blocks())
    if not row.paths:
        return tuple(_marked_lists(model)) or _row_of_decoder(model)
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    return tuple(f"{prefix}{path}" for path in row.paths)


def _row_of_decoder(model: nn.Module) -> tuple[str, ...]:
    """The blocks that a row of `ARCHITECTURES` names, in a model whose classes are not marked (CTRL)."""
    config = model.config
    path = f"{stack_path(config)}.{ARCHITECTURES[text_config(config).model_type].blocks}"
    if model.base_model is model:
        path = path.removeprefix(f"{model.base_model_prefix}.")
    return (path,)


def _marked_lists(module: nn.Module, path: str = "") -> Iterator[str]:
    """The outermost lists of modules whose class says that they are blocks, in the model's own order."""
    # Costs a tenth of a second, which importing this package must not.
    from transformers.modeling_layers import GradientCheckpointingLayer

    for name, child in module.named_children():
        inside = f"{path}.{name}" if path else name
        if (
            isinstance(child, nn.ModuleList)
            and len(child)
            and all(isinstance(m, GradientCheckpointingLayer) for m in child)
        ):
            yield inside
        else:
            yield from _marked_lists(child, inside)


def stays_out(model: nn.Module, name: str) -> str | None:
    """Why the layer `name` of a model of a known type stays as it is; None if it does not."""
    decoder = ARCHITECTURES.get(text_config(model.config).model_type)
    alone = decoder is not None and not getattr(model.config, "is_encoder_decoder", False)
    if alone and (why := next((why for part, why in decoder.uncompressed.items() if re.search(part, name)), None)):
        return why
    row = MODELS.get(model.config.model_type, Blocks())
    return next((why for end, why in row.without.items() if re.search(rf"(^|\.)({end})$", name)), None)
