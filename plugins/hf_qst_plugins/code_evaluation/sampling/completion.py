"""Where a completion ends, and whether it parses."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Sequence

MODULE_STOPS = ("\nclass ", "\nassert ", '\n"""', "\nprint(", "\nif __name__")
"""Texts that end a completion of a problem without a signature (MBPP): further classes, tests, examples."""
WHITESPACE = " \t\f\r\n"
"""The characters that Python's tokenizer treats as whitespace or as line ends."""
# `str.splitlines` also splits at other characters, which Python allows in strings and comments.
_LINE_END = re.compile(r"\r\n|\r|\n")
# A form feed resets the column to 0.
_AT_COLUMN_0 = re.compile(r"(?:[ \t]*\f)*(?=[^ \t\f\r\n])")


def truncate(completion: str, stop_strings: Sequence[str] = (), body: bool = True, on_new_line: bool = False) -> str:
    """The part of `completion` that belongs to the problem.

    With `body`, it ends before the first non-blank line at column 0: code, a comment or a decorator. In every case it
    ends before the first of `stop_strings`; a line break in these matches every kind of line end. Lines and columns are
    those of Python's tokenizer. Nothing is parsed, as in the literature, so text at column 0 inside a multi-line string
    ends the completion too.

    Args:
        completion: generated text.
        stop_strings: texts that end it; they are cut off too.
        body: whether the completion is the body of a function that the prompt opened.
        on_new_line: whether the prompt ends in a line break, so that the completion starts a line.
    """
    unix = completion.replace("\r", "\n")  # of the same length
    ends = [at for text in (completion, unix) for at in map(text.find, stop_strings) if at >= 0]
    if body:
        lines = [0] if on_new_line else []
        lines += [end.end() for end in _LINE_END.finditer(completion)]
        ends += [at for at in lines if _AT_COLUMN_0.match(completion, at)][:1]
    return completion[: min(ends)] if ends else completion


def parses(source: str) -> bool:
    """Whether this interpreter's `ast.parse` accepts `source`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escapes and the like in the program
            ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
