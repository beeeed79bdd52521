"""Where a completion ends, and what program it makes."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Sequence

MODULE_STOPS = ("\nclass ", "\nassert ", '\n"""', "\nprint(", "\nif __name__")
"""Where the code of a problem without a signature ends (MBPP): further classes, tests, examples."""
WHITESPACE = " \t\f\r\n"
"""All that Python's tokenizer takes for whitespace between tokens and for the ends of lines."""
# Python's own: not the further characters at which `str.splitlines` splits, which may stand in a string or a comment.
_LINE_END = re.compile(r"\r\n|\r|\n")
# A form feed takes the column back to 0.
_AT_COLUMN_0 = re.compile(r"(?:[ \t]*\f)*(?=[^ \t\f\r\n])")


def truncate(completion: str, stop_strings: Sequence[str] = (), body: bool = True, on_new_line: bool = False) -> str:
    """The part of `completion` that belongs to the problem.

    With `body`, it ends before the first line after the body's beginning that stands at column 0 (a line of code, a
    comment, a decorator; not a blank line, and not one before any indented line that only closes the prompt's own).
    In every case it ends before the first of `stop_strings`, in which a line break stands for every kind of line end.
    Lines end, and stand at column 0, where Python's tokenizer says so. Text at column 0 inside a multi-line string counts
    as a line: as in the literature's own rule nothing is parsed.

    Args:
        completion: generated text.
        stop_strings: texts that end it, themselves left out.
        body: the prompt opened a function and the completion is its body.
        on_new_line: the prompt ends in a line break, so that the completion's first line is a line of its own.
    """
    unix = completion.replace("\r", "\n")  # of the same length
    ends = [at for text in (completion, unix) for at in (text.find(stop) for stop in stop_strings) if at >= 0]
    if body:
        lines = [0] if on_new_line else []
        lines += [end.end() for end in _LINE_END.finditer(completion)]
        ends += [at for at in lines if _AT_COLUMN_0.match(completion, at)][:1]
    return completion[: min(ends)] if ends else completion


def parses(source: str) -> bool:
    """Whether `source` is Python to this interpreter's `ast.parse`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes and the like are the program's
            ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
