"""Position on the line and in the block, and lexical class, of each token of a Python file.

Both come from Python's `tokenize`. A model's token has the class of its first visible character.
"""

from __future__ import annotations

import bisect
import io
import keyword
import tokenize
from collections.abc import Sequence

import numpy as np

from ..sampling.completion import WHITESPACE

POSITIONS = (
    "first of a block",
    "first of an indented statement",
    "first of a column-0 statement",
    "first of a continuation line",
    "first of a line in a string",
    "first of a comment line",
    "second of a line",
    "later on a line",
    "indentation",
    "newline",
)
GROUPS = ("block start", "line start", "rest")
GROUP_OF_POSITION = (0, 1, 1, 1, 1, 1, 2, 2, 2, 2)
SYNTAX = ("identifier", "keyword", "number", "string", "operator", "comment", "newline/indent", "later piece")
"""Lexical class of a token that begins a lexical token; a token that continues one is a `later piece`."""

_WHITESPACE = SYNTAX.index("newline/indent")
_BLOCK, _INDENTED, _COLUMN_0, _CONTINUATION, _IN_STRING, _COMMENT, _SECOND, _LATER, _INDENTATION, _NEWLINE = range(10)
_NO_STATEMENT = {tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT, tokenize.NEWLINE, tokenize.ENDMARKER}


def _lexical_class(token: tokenize.TokenInfo) -> int | None:
    if token.type == tokenize.NAME:
        return SYNTAX.index("keyword" if keyword.iskeyword(token.string) else "identifier")
    if token.type == tokenize.NUMBER:
        return SYNTAX.index("number")
    if token.type == tokenize.COMMENT:
        return SYNTAX.index("comment")
    if token.type == tokenize.OP:
        return SYNTAX.index("operator")
    # STRING, and from Python 3.12 the parts of an f-string.
    return SYNTAX.index("string") if "STRING" in tokenize.tok_name[token.type] else None


class SourceClasses:
    """The lexical structure of one Python file.

    Args:
        text: the file, line breaks as `\\n`.

    Raises:
        SyntaxError, tokenize.TokenError: the text is not Python.
    """

    def __init__(self, text: str):
        self.text = text
        self._lines = [0, *(at + 1 for at, character in enumerate(text) if character == "\n")]
        self._syntax = np.full(len(text) + 1, _WHITESPACE, dtype=np.uint8)
        self._lexical_start = np.zeros(len(text) + 1, dtype=bool)
        self._statements: dict[int, int] = {}
        indented, begins = False, True
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            start, end = self._offset(token.start), self._offset(token.end)
            kind = _lexical_class(token)
            if kind is not None:
                self._syntax[start:end] = kind
                self._lexical_start[start] = True
            if token.type == tokenize.INDENT:
                indented = True
            elif token.type == tokenize.NEWLINE:
                begins = True
            elif begins and token.type not in _NO_STATEMENT:
                self._statements[start] = _BLOCK if indented else _INDENTED if token.start[1] else _COLUMN_0
                indented = begins = False

    def _offset(self, position: tuple[int, int]) -> int:
        row, column = position
        return min(self._lines[row - 1] + column, len(self.text)) if row <= len(self._lines) else len(self.text)

    def _line_position(self, at: int) -> int:
        """The class of a line's first visible character."""
        if at in self._statements:
            return self._statements[at]
        kind = SYNTAX[self._syntax[at]]
        if kind == "comment":
            return _COMMENT
        return _IN_STRING if kind == "string" and not self._lexical_start[at] else _CONTINUATION

    def classify(self, spans: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """Index into `POSITIONS` and index into `SYNTAX` of each token, uint8 [tokens] each.

        Args:
            spans: first and last + 1 character of each token, in the order of the text.
        """
        positions, syntax = np.full(len(spans), _LATER, np.uint8), np.full(len(spans), _WHITESPACE, np.uint8)
        first_on_line = -1
        for index, (start, end) in enumerate(spans):
            piece = self.text[start:end]
            visible = piece.lstrip(WHITESPACE)
            if not visible:
                line = self._lines[bisect.bisect_right(self._lines, start) - 1]
                if "\n" in piece:
                    positions[index] = _NEWLINE
                elif not self.text[line:start].strip(WHITESPACE):
                    positions[index] = _INDENTATION
                continue
            at = end - len(visible)
            kind = self._syntax[at]
            syntax[index] = kind if self._lexical_start[at] or kind == _WHITESPACE else SYNTAX.index("later piece")
            line = self._lines[bisect.bisect_right(self._lines, at) - 1]
            if not self.text[line:at].strip(WHITESPACE):
                positions[index] = self._line_position(at)
                first_on_line = index
            elif first_on_line == index - 1 and index > 0:
                positions[index] = _SECOND
        return positions, syntax
