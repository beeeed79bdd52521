"""Tokenizers of every kind that code models use, trained on some of the standard library, and text to run them on."""

from __future__ import annotations

import functools
import json
import sysconfig
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from examples import train_base

KINDS = ("gpt2", "cl100k", "newline_merging", "sentencepiece", "project")
CL100K = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# A line's last punctuation, its break and the next line's indentation are one piece.
NEWLINE_MERGING = r"[^\w\s]*\s*\n\s*|\w+|[^\w\s]+|[^\S\n]+"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


@functools.cache
def standard_library() -> tuple[str, ...]:
    """The texts of the modules at the top of the standard library, by name."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return tuple(path.read_bytes().decode() for path in paths)


@functools.cache
def sources(characters: int = 1_000_000) -> tuple[str, ...]:
    """About so many characters of standard library, every fifth file with Windows line ends or tabs."""
    texts, total = [], 0
    for i, text in enumerate(standard_library()):
        if total >= characters:
            break
        if i % 5 == 0:
            text = text.replace("\n", "\r\n")
        elif i % 5 == 1:
            text = text.replace("    ", "\t")
        texts.append(text)
        total += len(text)
    return tuple(texts)


@functools.cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """One of `KINDS`."""
    if kind == "project":
        return AutoTokenizer.from_pretrained(Path(train_base.__file__).parent / "base_model")
    return sentencepiece() if kind == "sentencepiece" else byte_level(kind)


def _training_texts() -> list[str]:
    return list(standard_library()[-60:])


def byte_level(kind: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE behind the regex of GPT-2, of cl100k (Llama 3, Qwen), or one that merges over line breaks."""
    made = Tokenizer(models.BPE())
    if kind == "gpt2":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        pattern = Regex({"cl100k": CL100K, "newline_merging": NEWLINE_MERGING}[kind])
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(pattern, behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        show_progress=False,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator(_training_texts(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False, **SPECIAL)


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2's: spaces are U+2581, one is put before a text, and line breaks are byte tokens."""
    pieces = pre_tokenizers.Split(Regex(r"▁+(?=▁)|▁?[^▁\n]+|▁|\n"), behavior="isolated")
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learned = Tokenizer(models.BPE())
    learned.normalizer, learned.pre_tokenizer = spaces, pieces
    trainer = trainers.BpeTrainer(vocab_size=1700, show_progress=False)
    learned.train_from_iterator((line for text in _training_texts() for line in text.split("\n")), trainer)
    state = models.BPE.__getstate__(learned.model)
    return _with_bytes(state, spaces, pieces)


def _with_bytes(state: bytes, spaces, pieces) -> PreTrainedTokenizerFast:
    trained = json.loads(state)
    merges = [tuple(merge) for merge in trained["merges"] if "\t" not in "".join(merge)]
    names = ["<unk>", *SPECIAL.values(), *(f"<0x{byte:02X}>" for byte in range(256))]
    kept = [token for token, _ in sorted(trained["vocab"].items(), key=lambda item: item[1]) if "\t" not in token]
    vocabulary = {token: index for index, token in enumerate([*names, *kept])}
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer, made.pre_tokenizer = spaces, pieces
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, clean_up_tokenization_spaces=False, unk_token="<unk>", **SPECIAL
    )
