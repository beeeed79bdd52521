"""Where a supported model keeps the list of its transformer blocks, vision and text encoders included.

Decoder-only language models are in `hf_qst.base_model.decoder_stack`. To support another encoder, add a row to
`ENCODERS`.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from hf_qst.base_model.decoder_stack import ARCHITECTURES, WRAPPERS, stack_path, text_config

# Path of the blocks in a model with a head, by model type.
ENCODERS = {
    "vit": "vit.layers",
    "deit": "deit.layers",
    "swin": "swin.encoder.layers",
}


def known_types() -> list[str]:
    """Model types whose blocks are known."""
    return sorted({*ARCHITECTURES, *WRAPPERS, *ENCODERS})


def find_blocks(model: nn.Module) -> str | None:
    """Path of the list of a model's transformer blocks, with a head or without; None for a model of no known type.

    A `PeftModel` is no known type either.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    path, stack = ENCODERS.get(model.config.model_type), stack_path(model.config)
    if path is None and stack is not None and not getattr(model.config, "is_encoder_decoder", False):
        path = f"{stack}.{ARCHITECTURES[text_config(model.config).model_type].blocks}"
    if path is not None and model.base_model is model:
        path = path.removeprefix(f"{model.base_model_prefix}.")
    return path if path in dict(model.named_modules()) else None
