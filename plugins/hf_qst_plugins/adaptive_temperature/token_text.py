"""The text that each id of a vocabulary adds to the text before it.

It is read from the tokenizer once per vocabulary. Generation then works with ids alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

WHITESPACE = " \t\r\f\v"
UNASSIGNED = "\ufffd"
"""Text of an id that the tokenizer does not use: neither a line break nor indentation."""


def byte_of_character() -> dict[str, int]:
    """GPT-2's byte-level alphabet: the byte of each of its 256 printable characters."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _backend_description(tokenizer) -> dict | None:
    """The description by `tokenizers`, without the padding and truncation of earlier calls; None for slow tokenizers."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    described = json.loads(backend.to_str())
    return {key: value for key, value in described.items() if key not in ("padding", "truncation")}


def tokenizer_hash(tokenizer) -> str:
    """SHA-256 (hex) of all that determines the texts: vocabulary, merges, decoder, special ids."""
    described = _backend_description(tokenizer) or {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    added = {index: [str(token), token.special] for index, token in tokenizer.added_tokens_decoder.items()}
    parts = [described, added, sorted(tokenizer.all_special_ids)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def is_byte_level(tokenizer) -> bool:
    """Whether tokens are bytes in GPT-2's alphabet, so their text needs no decoding."""
    described = _backend_description(tokenizer)
    return bool(described) and (described.get("decoder") or {}).get("type") == "ByteLevel"


def _special_ids(tokenizer) -> set[int]:
    """Padding, begin, end and chat markers. An added token that is only whitespace counts as text in any case."""
    added = tokenizer.added_tokens_decoder
    special = set(tokenizer.all_special_ids) | {index for index, token in added.items() if token.special}
    return {index for index in special if not (index in added and str(added[index]).isspace())}


def _from_bytes(tokenizer, vocabulary: Mapping[str, int]) -> dict[int, str]:
    byte_of = byte_of_character()
    texts = {
        index: bytes(byte_of[character] for character in token).decode("utf-8", errors="replace")
        for token, index in vocabulary.items()
        if all(character in byte_of for character in token)
    }
    # Added tokens are stored as text, not in the byte alphabet.
    return texts | {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()}


def _from_decoding(tokenizer, ids) -> dict[int, str]:
    """Decode each id after an anchor token, because SentencePiece strips the first space of a text."""

    def decode(tokens: list[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    anchor = tokenizer.encode("x", add_special_tokens=False)[-1:]
    before = decode(anchor)
    texts = {}
    for index in ids:
        after = decode([*anchor, index])
        texts[index] = after[len(before) :] if after.startswith(before) else decode([index])
    return texts


def token_texts(tokenizer, byte_level: bool | None = None) -> list[str | None]:
    """The text that each id adds; None for ids between texts (padding, begin, end, chat markers).

    Args:
        tokenizer (`PreTrainedTokenizerBase`): any tokenizer of transformers.
        byte_level (`bool`, *optional*): True reads the bytes from the vocabulary's strings. False decodes every id after
            an anchor, which is slower and works for any tokenizer. None decides by the tokenizer.

    Returns:
        `list[str | None]` of length (largest id + 1). Incomplete characters and unused ids are U+FFFD.
    """
    vocabulary = tokenizer.get_vocab()
    known = set(vocabulary.values()) | set(tokenizer.added_tokens_decoder)
    if is_byte_level(tokenizer) if byte_level is None else byte_level:
        texts = _from_bytes(tokenizer, vocabulary)
    else:
        texts = _from_decoding(tokenizer, sorted(known))
    special = _special_ids(tokenizer)
    return [None if index in special else texts.get(index, UNASSIGNED) for index in range(max(known) + 1)]


def adds_leading_space(tokenizer, texts: list[str | None]) -> bool:
    """Whether the tokenizer adds a leading space to a text, as SentencePiece's dummy prefix does."""
    first = [index for index in tokenizer.encode("x", add_special_tokens=False) if texts[index] is not None]
    return bool(first) and texts[first[0]].startswith(" ")


def drops_line_breaks(tokenizer, texts: list[str | None]) -> bool:
    """Whether encoding loses line breaks, for example to a normaliser that turns them into spaces."""
    return not any("\n" in (texts[index] or "") for index in tokenizer.encode("x\nx", add_special_tokens=False))
