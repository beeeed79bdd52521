"""Where a completion ends, and what program it makes."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Sequence

MODULE_STOPS = ("\nclass ", "\nassert ", '\n"""', "\nprint(", "\nif __name__")
"""Where the code of a problem without a signature ends (MBPP): further classes, tests, examples."""


def truncate(completion: str, stop_strings: Sequence[str] = (), body: bool = True, on_new_line: bool = False) -> str:
    """The part of `completion` that belongs to the problem.

    With `body`, it ends before the first line after the body's beginning that stands at column 0 (a line of code, a
    comment, a decorator; not a blank line, and not one before any indented line that only closes the prompt's own).
    In every case it ends before the first of `stop_strings`. Text at column 0 inside a multi-line string counts as a
    line: as in the literature's own rule nothing is parsed.

    Args:
        completion: generated text.
        stop_strings: texts that end it, themselves left out.
        body: the prompt opened a function and the completion is its body.
        on_new_line: the prompt ends in a line break, so that the completion's first line is a line of its own.
    """
    ends = [at for at in (completion.find(stop) for stop in stop_strings) if at >= 0]
    if body:
        at = 0
        for number, line in enumerate(completion.splitlines(keepends=True)):
            own_line = number > 0 or on_new_line
            if own_line and line.strip() and not line[0].isspace():
                ends.append(at)
                break
            at += len(line)
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
