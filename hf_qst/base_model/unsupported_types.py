"""Language models of transformers that have no row, and why: for errors, `supported_models()` and the docs page."""

from __future__ import annotations

_NO_MASK = "its blocks have no attention whose mask and cache a side network could follow"
_OWN_STATE = "its recurrent state is no cache, in which a side network could keep its keys and values"
_CODES = "a step predicts codes of audio in several codebooks, not one token"
_DRAFT = "it drafts tokens from the states and the cache of another model"

UNSUPPORTED: dict[str, str] = {
    "blt": "it has three stacks, over bytes and over patches of them",
    "cpmant": "its attention takes its positions and its mask from a bias of segments and distances",
    **dict.fromkeys(("falcon_mamba", "mamba", "mamba2"), _NO_MASK),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), _DRAFT),
    "git": "its loss and its cache count the places of images before the text",
    "hrm_text": "its blocks run several times in a pass",
    "minimax": "it takes a cache of a class of its own alone",
    "mllama": "its blocks of cross-attention run only where there are images",
    **dict.fromkeys(("musicgen", "musicgen_melody"), _CODES),
    "moss_transcribe_diarize": "its tower reads sound, and no model with such a tower has been tried",
    "prophetnet": "it predicts several tokens at each position, with a stream for each",
    "reformer": "its blocks have two residual streams that are computed again in the backward pass",
    **dict.fromkeys(("rwkv", "xlstm"), _OWN_STATE),
    "xlm": "its attentions and MLPs are in separate lists",
    "xlnet": "it reads [sequence, batch, channels] in two streams",
}
"""Why side tuning and pruning do not work, by `config.model_type`. Mixed rank compresses layers that are named."""
