"""The text of every id of a vocabulary, read once per tokenizer and cached."""

from __future__ import annotations

import functools
import logging
import os
import weakref
from collections.abc import Mapping, Sequence
from enum import IntEnum
from pathlib import Path

import torch

from hf_qst.saved.json_files import read_json, write_json
from hf_qst.tuner.config import is_count
from hf_qst_plugins.adaptive_temperature.token_text import (
    WHITESPACE,
    adds_leading_space,
    drops_line_breaks,
    token_texts,
    tokenizer_hash,
)

logger = logging.getLogger(__name__)

LANGUAGES = ("python", "c", "cpp", "java", "javascript", "go", "rust")
FORMAT_VERSION = 1

_built: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
"""Per tokenizer object: its number of tokens and special ids, and the result of `_texts`."""


class TokenKind(IntEnum):
    """How a token ends, with regard to lines and indentation."""

    CONTENT = 0
    """Ends in something other than whitespace."""
    BLANK = 1
    """Only whitespace without a line break, or no text."""
    NEWLINE = 2
    """Ends in a line break."""
    INDENTED_NEWLINE = 3
    """Ends in a line break and indentation."""
    BOUNDARY = 4
    """Padding, begin, end or chat marker; a text starts after it."""


class TokenizerMismatchError(ValueError):
    """A saved table or probe belongs to another tokenizer."""


def _kind(text: str | None) -> TokenKind:
    if text is None:
        return TokenKind.BOUNDARY
    _, line_break, tail = text.rpartition("\n")
    if tail.strip(WHITESPACE):
        return TokenKind.CONTENT
    if not line_break:
        return TokenKind.BLANK
    return TokenKind.INDENTED_NEWLINE if indentation_width(tail) else TokenKind.NEWLINE


def indentation_width(whitespace: str, tab_width: int = 8) -> int:
    """Columns of leading whitespace: a space is one, a tab goes to the next multiple of `tab_width`, \\r, \\f, \\v are none."""
    return len("".join(c for c in whitespace if c in " \t").expandtabs(tab_width))


class VocabularyTable:
    """The text of every id of a vocabulary, with the kind and indentation width of each.

    Checkpoints pad their vocabularies. Ids at or above `len(table)` count as content.

    Args:
        texts (`Sequence[str | None]`): the text that each id adds after another token; None for a boundary.
        language (`str`): one of `LANGUAGES`; determines how blocks are opened and comments start.
        tab_width (`int`): columns of a tab in `widths`.
        adds_leading_space (`bool`): whether the tokenizer adds a leading space to a text.
        tokenizer_hash (`str`): of the tokenizer; `""` for a table made by hand.

    Raises:
        ValueError: an unknown language, a `tab_width` below 1, or no token with a line break or none with indentation,
            so that a rule about lines would silently never fire.
    """

    def __init__(
        self,
        texts: Sequence[str | None],
        language: str = "python",
        tab_width: int = 8,
        adds_leading_space: bool = False,
        tokenizer_hash: str = "",
    ):
        if language not in LANGUAGES:
            raise ValueError(f"language must be one of {', '.join(LANGUAGES)}, got {language!r}")
        if not is_count(tab_width):
            raise ValueError(f"tab_width must be an integer >= 1, got {tab_width!r}")
        self.texts = list(texts)
        self.language = language
        self.tab_width = tab_width
        self.adds_leading_space = bool(adds_leading_space)
        self.tokenizer_hash = tokenizer_hash
        self._require_lines()

    def _require_lines(self) -> None:
        texts = [text for text in self.texts if text is not None]
        if not any("\n" in text for text in texts):
            raise ValueError(
                f"no newline token: none of the {len(texts)} texts of this vocabulary holds a line break, so no line "
                "would ever start; use the tokenizer of a model that writes code, or name the token in `overrides`"
            )
        if not any(indentation_width(text.rpartition("\n")[2]) and _kind(text) != TokenKind.CONTENT for text in texts):
            raise ValueError(
                f"no indentation token: none of the {len(texts)} texts of this vocabulary ends in spaces or tabs alone, "
                "so no line would ever be indented; name such tokens in `overrides` if they are added tokens"
            )

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        return f"VocabularyTable({len(self)} ids, language={self.language!r}, tokenizer {self.tokenizer_hash[:12]!r})"

    @functools.cached_property
    def kinds(self) -> torch.Tensor:
        """The `TokenKind` of each id, uint8 `[vocabulary]`."""
        return torch.tensor([_kind(text) for text in self.texts], dtype=torch.uint8)

    @functools.cached_property
    def widths(self) -> torch.Tensor:
        """Columns of whitespace at the end of each id's text, 0 for content, int16 `[vocabulary]`."""
        tails = [(text or "").rpartition("\n")[2] for text in self.texts]
        widths = [0 if tail.strip(WHITESPACE) else indentation_width(tail, self.tab_width) for tail in tails]
        return torch.tensor(widths, dtype=torch.int32).clamp(max=32_767).to(torch.int16)

    @classmethod
    def from_tokenizer(
        cls,
        tokenizer,
        language: str = "python",
        tab_width: int = 8,
        overrides: Mapping[int, str | None] | None = None,
        disk_cache: bool = True,
    ) -> VocabularyTable:
        """The table of a tokenizer.

        The texts are cached in memory and on disk under `$HF_QST_CACHE` (else `~/.cache/hf_qst`), keyed by a hash of the
        tokenizer.

        Args:
            tokenizer (`PreTrainedTokenizerBase`): any tokenizer of transformers.
            language (`str`): see the class.
            tab_width (`int`): see the class.
            overrides (`Mapping[int, str | None]`, *optional*): the text of ids that the tokenizer decodes wrongly
                (CodeGeeX's `<|extratoken_12|>` means four spaces); None makes an id a boundary.
            disk_cache (`bool`): whether to use the cache on disk.

        Raises:
            ValueError: as the class; also if encoding drops line breaks, or an id in `overrides` does not exist.
        """
        texts, leading_space, key = _texts(tokenizer, disk_cache)
        texts = list(texts)
        for index, text in (overrides or {}).items():
            if not 0 <= index < len(texts):
                raise ValueError(f"overrides must name ids in [0, {len(texts)}), got {index!r}")
            texts[index] = text
        table = cls(texts, language, tab_width, leading_space, key)
        if drops_line_breaks(tokenizer, texts) and not any("\n" in (t or "") for t in (overrides or {}).values()):
            raise ValueError(
                "no newline token is ever used: the tokenizer drops line breaks when it encodes 'x\\nx'; use the "
                "tokenizer of a model that writes code"
            )
        return table

    def save(self, path: str | os.PathLike) -> None:
        """Write the table as JSON, completely or not at all."""
        values = {
            "version": FORMAT_VERSION,
            "tokenizer_hash": self.tokenizer_hash,
            "adds_leading_space": self.adds_leading_space,
            "language": self.language,
            "tab_width": self.tab_width,
            "texts": self.texts,
        }
        write_json(path, values)

    @classmethod
    def load(cls, path: str | os.PathLike, tokenizer=None) -> VocabularyTable:
        """Read a saved table.

        Args:
            path: a file written by `save`.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): the tokenizer that the table must belong to.

        Raises:
            ValueError: the file is not a table of this version.
            TokenizerMismatchError: the table belongs to another tokenizer.
        """
        values = read_json(path)
        fields = {"version", "tokenizer_hash", "adds_leading_space", "language", "tab_width", "texts"}
        if values.keys() != fields or values["version"] != FORMAT_VERSION:
            raise ValueError(f"{os.fspath(path)} is not a vocabulary table of version {FORMAT_VERSION}")
        if tokenizer is not None:
            require_tokenizer(values["tokenizer_hash"], tokenizer_hash(tokenizer), os.fspath(path))
        del values["version"]
        return cls(**values)


def require_tokenizer(saved: str, given: str, what: str) -> None:
    """Raise `TokenizerMismatchError` unless both hashes are the same."""
    if saved != given:
        raise TokenizerMismatchError(
            f"{what} belongs to the tokenizer with hash {saved[:12]!r}, the given one has {given[:12]!r}"
        )


def cache_folder() -> Path:
    """Folder of cached tables: `$HF_QST_CACHE`, else `~/.cache/hf_qst`."""
    return Path(os.environ.get("HF_QST_CACHE") or Path.home() / ".cache" / "hf_qst")


def _texts(tokenizer, disk_cache: bool) -> tuple[list[str | None], bool, str]:
    """(text of each id, whether the tokenizer adds a leading space, its hash), built at most once per tokenizer."""
    state = (len(tokenizer), tuple(tokenizer.all_special_ids))
    known = _built.get(tokenizer)
    if known is not None and known[0] == state:
        return known[1]
    key = tokenizer_hash(tokenizer)
    path = cache_folder() / f"vocabulary-{key[:24]}.json"
    result = _cached_texts(path, key) if disk_cache else None
    if result is None:
        texts = token_texts(tokenizer)
        result = (texts, adds_leading_space(tokenizer, texts), key)
        if disk_cache:
            _write_cache(path, result)
    _built[tokenizer] = (state, result)
    return result


def _cached_texts(path: Path, key: str) -> tuple[list[str | None], bool, str] | None:
    if not path.exists():
        return None
    try:
        values = read_json(path)
        if values["version"] == FORMAT_VERSION and values["tokenizer_hash"] == key:
            return values["texts"], values["adds_leading_space"], key
    except (ValueError, KeyError, TypeError, OSError) as error:
        logger.warning("the cached table %s cannot be read and is made again: %s", path, error)
    return None


def _write_cache(path: Path, result: tuple[list[str | None], bool, str]) -> None:
    texts, leading_space, key = result
    values = {"version": FORMAT_VERSION, "tokenizer_hash": key, "adds_leading_space": leading_space, "texts": texts}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, values)
    except OSError as error:
        logger.warning("the vocabulary table is not kept on disk, %s cannot be written: %s", path.parent, error)
