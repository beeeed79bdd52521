"""Toy data: a language small models learn in a few steps, as token ids and as text with a tokenizer."""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.architectures import VOCAB


def chain_rows(count: int = 32, length: int = 16, seed: int = 0) -> list[list[int]]:
    """Rows of a Markov chain in which each token has two successors."""
    generator = torch.Generator().manual_seed(1234)
    successors = torch.randint(3, VOCAB, (VOCAB, 2), generator=generator)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCAB, (count, 1), generator=generator)
    for _ in range(length - 1):
        choice = torch.randint(0, 2, (count, 1), generator=generator)
        tokens = torch.cat([tokens, successors[tokens[:, -1]].gather(1, choice)], 1)
    return tokens.tolist()


def token_dataset(count: int = 32, length: int = 16, seed: int = 0, ragged: bool = False) -> Dataset:
    """`input_ids` and `labels`; with `ragged`, a different number of labels in each row counts."""
    rows = chain_rows(count, length, seed)
    labels = [
        [-100] * (i * 5 % (length - 3)) + row[i * 5 % (length - 3) :] if ragged else row for i, row in enumerate(rows)
    ]
    return Dataset.from_dict({"input_ids": rows, "labels": labels})


def tokenizer() -> PreTrainedTokenizerFast:
    """One word a token: `t3`, `t4`, ..."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"t{i}": i for i in range(3, VOCAB)}}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def text_dataset(count: int = 32, seed: int = 0) -> Dataset:
    """Lines of text of different lengths for `tokenizer()`."""
    rows = chain_rows(count, 16, seed)
    return Dataset.from_dict({"text": [" ".join(f"t{t}" for t in row[: 6 + i % 10]) for i, row in enumerate(rows)]})
