"""The earlier place of `hf_qst.base_model.decoder_stack`, for code that imports it from here."""

from hf_qst.base_model.decoder_stack import (  # noqa: F401
    DecoderStack,
    UnsupportedArchitectureError,
    find_decoder_stack,
)
