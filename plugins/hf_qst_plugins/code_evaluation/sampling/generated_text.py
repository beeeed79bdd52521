"""Decoding of generated tokens to the exact text that continues the prompt."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


class GeneratedText:
    """Decodes the tokens that follow a prompt.

    Decoding them alone fails in two ways. SentencePiece strips the first space of a text. And in a run of byte tokens
    (`<0x0A>`) that is not valid UTF-8, for example because its last character is incomplete, every byte becomes a
    replacement character, line breaks included. So the tokens are decoded after a token of known text (the anchor), and
    runs of byte tokens are decoded separately.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self._special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special |= set(tokenizer.all_special_ids)
        self._anchor, self._skip = self._find_anchor()
        self._bytes = self._find_bytes()

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode([*self._anchor, *ids], clean_up_tokenization_spaces=False)[self._skip :]

    def _find_anchor(self) -> tuple[list[int], int]:
        """A token whose text does not depend on the next token, and the length of that text."""
        for character in "x0a:":
            ids = self.tokenizer(character, add_special_tokens=False)["input_ids"][-1:]
            alone, twice = (self.tokenizer.decode(ids * n, clean_up_tokenization_spaces=False) for n in (1, 2))
            if alone.strip() == character and twice.startswith(alone) and not self._special.intersection(ids):
                return ids, len(alone)
        return [], 0

    def _find_bytes(self) -> dict[int, int]:
        """Token id to byte; empty if the tokenizer has no such byte tokens."""
        names = [f"<0x{byte:02X}>" for byte in range(256)]
        ids = self.tokenizer.convert_tokens_to_ids(names)
        if None in ids or self.tokenizer.convert_ids_to_tokens(ids) != names or self._decode([ids[10]]) != "\n":
            return {}
        return {number: byte for byte, number in enumerate(ids)}

    def __call__(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens."""
        ids = [number for number in ids if number not in self._special]
        parts = []
        for spelled, run in itertools.groupby(ids, self._bytes.__contains__):
            if spelled:
                parts.append(bytes(self._bytes[number] for number in run).decode("utf-8", "replace"))
            else:
                parts.append(self._decode(list(run)))
        return "".join(parts)
