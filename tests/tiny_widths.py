"""Sizes of tiny models of architectures that are not in `tests.architectures`, as arguments of their configurations."""

WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ONE_LAYER = {**WIDTHS, "num_hidden_layers": 1}
# 16 patches
PATCHES = {"image_size": 32, "patch_size": 8}
# BART, Whisper
ENCODER_DECODER = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
}  # fmt: skip
