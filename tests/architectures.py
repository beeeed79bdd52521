"""Tiny random models, one for each row of `hf_qst.decoder_stack.ARCHITECTURES`."""

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 96
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _common(*without, **changes):
    return {k: v for k, v in {**_COMMON, **changes}.items() if k not in without}


CONFIGS = {
    "llama": lambda: LlamaConfig(**_common()),
    # An 8-token window, so that generation runs past it.
    "mistral": lambda: MistralConfig(**_common(sliding_window=8)),
    "qwen2": lambda: Qwen2Config(**_common()),
    "qwen3": lambda: Qwen3Config(**_common(head_dim=32)),
    "gemma2": lambda: Gemma2Config(**_common(head_dim=16, sliding_window=8, query_pre_attn_scalar=16)),
    "gemma3_text": lambda: Gemma3TextConfig(**_common(head_dim=16, sliding_window=8, query_pre_attn_scalar=16)),
    "opt": lambda: OPTConfig(
        **_common("intermediate_size", "num_key_value_heads"), ffn_dim=128, word_embed_proj_dim=64, dropout=0.1
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_embd=64, n_layer=3, n_head=4, n_positions=128, pad_token_id=0, bos_token_id=1, eos_token_id=2
    ),
    "phi": lambda: PhiConfig(**_common("num_key_value_heads")),
    "gpt_neox": lambda: GPTNeoXConfig(**_common("num_key_value_heads"), rotary_pct=0.5),
}


def tiny(name: str, seed: int = 0, dtype=torch.float32, classifier: bool = False, **changes):
    """A random model of this type in eval mode; `changes` go to its config."""
    config = CONFIGS[name]()
    config.dtype = dtype
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    model = auto.from_config(config)
    # The usual 0.02 makes the logits of a tiny model nearly flat, and tests of greedy decoding would compare ties.
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.to(dtype).eval()


def token_batch(rows: int = 2, length: int = 12, seed: int = 0, low: int = 3) -> torch.Tensor:
    """Random token ids [rows, length], none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, VOCAB, (rows, length), generator=generator)
