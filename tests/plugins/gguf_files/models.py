"""Tiny models of the types that GGUF files are written for, and tokenizers."""

import json

import torch
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from hf_qst.pruning import prune_blocks
from tests.plugins.code_tokenizers import SPECIAL, tokenizer
from tests.pruned_models import random_masks
from tests.tiny_decoders import spread, tiny_config

TEXTS = ["def f(x2):\n    return x + 1234  # it's\n\n\tif é:\n", "Hello world. 12 34567", " a  b</s>c"]
# llama.cpp's own order of layers, and no windows where it has none.
WINDOWS = {
    "gemma2": ["sliding_attention", "full_attention"] * 3,
    "gemma3_text": ["sliding_attention"] * 5 + ["full_attention"],
}


def dense(name="llama", **changes):
    config = tiny_config(name)
    fields = {"vocab_size": len(tokenizer("gpt2")) + 3, **changes}
    if name in WINDOWS:
        fields |= {"query_pre_attn_scalar": 16, "num_hidden_layers": 6, "layer_types": WINDOWS[name]}
    else:
        fields.setdefault("sliding_window", None)
    for field, value in fields.items():
        setattr(config, field, value)
    torch.manual_seed(0)
    return spread(AutoModelForCausalLM.from_config(config))


def pruned(name="llama", **changes):
    model = dense(name, **changes)
    return prune_blocks(model, random_masks(model))


ROTATIONS = {
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip


def _with_single_digits():
    made = Tokenizer.from_str(tokenizer("gpt2").backend_tokenizer.to_str())
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), made.pre_tokenizer])
    return PreTrainedTokenizerFast(tokenizer_object=made)


def _as_sentencepiece_makes_them():
    """Every pair of tokens that makes a token is merged, and text is not split before."""
    state = json.loads(tokenizer("sentencepiece").backend_tokenizer.to_str())
    vocabulary, learned = state["model"]["vocab"], state["model"]["merges"]
    scores = {"".join(pair): -i for i, pair in reversed([*enumerate(learned)])}
    state["model"]["merges"] = [list(pair) for pair in generate_merges(vocabulary, scores)]
    state["pre_tokenizer"] = None
    made = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", **SPECIAL)


def tokenizer_of(kind):
    """One of `tests.plugins.code_tokenizers`, GPT-2's with every digit by itself, or one of Llama 2's kind."""
    makers = {"digits": _with_single_digits, "llama": _as_sentencepiece_makes_them}
    return makers[kind]() if kind in makers else tokenizer(kind)
