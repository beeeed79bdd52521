"""Tiny models on disk in the place of those that PEFT's tests load from the Hub.

They lie in folders called like the Hub's repositories, so that `from_pretrained` finds them from the folder above.
"""

from __future__ import annotations

from pathlib import Path

from tests.architectures import tiny

# GPT-J, the sixth of PEFT's, is of no type whose blocks are known.
STAND_INS = {
    "trl-internal-testing/tiny-random-LlamaForCausalLM": "llama",
    "peft-internal-testing/tiny-random-OPTForCausalLM": "opt",
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": "gpt2",
    "peft-internal-testing/tiny-dummy-qwen2": "qwen2",
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": "gemma3_text",
}


def make(folder: Path) -> Path:
    """Save the models in `folder`."""
    for repository, name in STAND_INS.items():
        tiny(name).save_pretrained(folder / repository)
    return folder
