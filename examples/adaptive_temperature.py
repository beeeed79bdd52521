"""Sample code with one temperature throughout, and with the adaptive temperature, from the project's own base model.

python -m examples.adaptive_temperature
python -m examples.adaptive_temperature --prompt 'def area(radius):' --block-temperature 1.0 --temperature 0.3
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.real_model import HELP, model_argument
from hf_qst_plugins.adaptive_temperature import BlockStart, VocabularyTable, adaptive_generate_kwargs

BASE_MODEL = Path(__file__).parent / "base_model"
PROMPT = "import os\n\n\ndef count_lines(path):\n    "


def marked(text_of_token: list[str], hot: list[bool]) -> str:
    """The text with each token that was drawn hot in angle quotes."""
    return "".join(f"«{text}»" if is_hot else text for text, is_hot in zip(text_of_token, hot, strict=True))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=model_argument, default=str(BASE_MODEL), help=HELP)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--block-temperature", type=float, default=0.8)
    parser.add_argument("--temperature", type=float, default=0.5)
    parser.add_argument("--scope", default="line")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    inputs = tokenizer([options.prompt] * options.samples, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    limit = {"max_new_tokens": options.tokens, "pad_token_id": tokenizer.eos_token_id}

    fixed = {"do_sample": True, "temperature": options.temperature, "top_k": 0, "top_p": 0.95}
    adaptive = adaptive_generate_kwargs(
        tokenizer,
        block_temperature=options.block_temperature,
        temperature=options.temperature,
        scope=options.scope,
    )
    table = VocabularyTable.from_tokenizer(tokenizer)
    policy = BlockStart(table, options.block_temperature, options.temperature, scope=options.scope)
    for name, settings in ((f"temperature {options.temperature}", fixed), ("adaptive temperature", adaptive)):
        torch.manual_seed(options.seed)
        for row in model.generate(**inputs, **settings, **limit):
            hot = policy.hot_along(row)[length:].tolist() if settings is adaptive else [False] * (len(row) - length)
            texts = [tokenizer.decode([token]) for token in row[length:].tolist()]
            print(f"--- {name}\n{options.prompt}{marked(texts, hot)}\n")


if __name__ == "__main__":
    main()
