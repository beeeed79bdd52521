"""Rules that decide from the text so far whether the next token is a challenging one.

A rule is a small automaton that reads the text token by token. The next token is drawn hot if the rule is in a hot
state. `token_automaton.py` turns a rule and a vocabulary into tables, so no text is read during generation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from hf_qst_plugins.adaptive_temperature.token_text import WHITESPACE

SCOPES = ("line", "block", "reference", "line+col0")


@dataclass(frozen=True)
class TokenRule:
    """An automaton over the texts of tokens.

    Args:
        start (hashable): the state at the start of a text.
        inside (hashable): the state assumed at the left edge of a window.
        after (`Callable`): `after(state, text)` is the state after a token's text.
        hot (`Callable`): `hot(state)` says whether the next token is drawn at the hot temperature.
        reduce (`Callable`): maps texts that `after` does not distinguish to one text, which makes building tables fast.
    """

    start: Hashable
    inside: Hashable
    after: Callable[[Hashable, str], Hashable]
    hot: Callable[[Hashable], bool]
    reduce: Callable[[str], str] = str


def character_rule(
    start: Hashable,
    inside: Hashable,
    step: Callable[[Hashable, str], Hashable],
    hot: Callable[[Hashable], bool],
    marks: str = "",
) -> TokenRule:
    """A rule that reads single characters.

    Args:
        start, inside, hot: see `TokenRule`.
        step (`Callable`): `step(state, character)` is the next state. It gets line breaks, whitespace and the characters
            of `marks` unchanged, and one `"x"` for a run of any others.
        marks (`str`): the characters besides whitespace that the rule distinguishes.
    """
    others = re.compile(f"[^\n{WHITESPACE}{re.escape(marks)}]+")

    def after(state: Hashable, text: str) -> Hashable:
        for character in others.sub("x", text):
            state = step(state, character)
        return state

    return TokenRule(start, inside, after, hot, reduce=lambda text: others.sub("x", text))


class Place(IntEnum):
    """Position of the next token on its line."""

    INSIDE = 0
    LINE_START = 1
    """At column 0."""
    INDENTED = 2
    """After indentation, at the line's first character that is not whitespace."""


def next_place(place: Place, character: str) -> Place:
    """The place after one more character. Carriage returns and form feeds take no column."""
    if character == "\n":
        return Place.LINE_START
    if place == Place.INSIDE or character not in WHITESPACE:
        return Place.INSIDE
    return Place.INDENTED if character in " \t" else place


class BlockState(NamedTuple):
    """State of the block rule."""

    place: Place
    after_opener: bool
    """Whether the last character of code, without comments and whitespace, opens a block."""
    reading: str
    """`"code"`; `"gap"` (after whitespace, where a comment may start); `"slash"`; `"comment"` (to the end of the line);
    `"block comment"`; `"star"` (in a block comment, after `*`)."""


def _next_reading(reading: str, character: str, line_comment: str) -> str:
    if character == "\n":
        return "block comment" if reading in ("block comment", "star") else "gap"
    if reading == "comment":
        return "comment"
    if reading in ("block comment", "star"):
        if character == "*":
            return "star"
        return "gap" if reading == "star" and character == "/" else "block comment"
    if character in WHITESPACE:
        return "gap"
    if reading == "slash" and character in "/*":
        return "comment" if character == "/" else "block comment"
    if reading == "gap" and character == line_comment[0]:
        return "comment" if len(line_comment) == 1 else "slash"
    return "code"


def _block_step(opener: str, line_comment: str) -> Callable[[BlockState, str], BlockState]:
    def step(state: BlockState, character: str) -> BlockState:
        reading = _next_reading(state.reading, character, line_comment)
        after_opener = state.after_opener
        if reading == "code":
            after_opener = character == opener
        elif state.reading == "slash" and reading == "gap":  # the slash was a division, not the start of a comment
            after_opener = False
        return BlockState(next_place(state.place, character), after_opener, reading)

    return step


def line_rule(column_zero: bool = False) -> TokenRule:
    """Hot at the start of an indented line; with `column_zero`, of any line."""
    hot = (Place.INDENTED, Place.LINE_START) if column_zero else (Place.INDENTED,)
    return character_rule(Place.LINE_START, Place.INSIDE, next_place, hot.__contains__)


def block_rule(language: str) -> TokenRule:
    """Hot at the start of an indented line if the last character of code before it opens a block.

    The opener is `:` in Python and `{` in the other languages. A comment starts only after whitespace, so
    `startswith("#")` and `"http://"` start none. Strings are not distinguished from code.
    """
    opener, line_comment = (":", "#") if language == "python" else ("{", "//")
    return character_rule(
        start=BlockState(Place.LINE_START, False, "gap"),
        inside=BlockState(Place.INSIDE, False, "code"),
        step=_block_step(opener, line_comment),
        hot=lambda state: state.place == Place.INDENTED and state.after_opener and state.reading == "gap",
        marks=opener + line_comment[:1] + ("" if language == "python" else "*"),
    )


def reference_rule() -> TokenRule:
    """The rule of the authors' released code: hot after the newline token and one or more tab or four-space tokens.

    Deeper indentation in a single token, and a newline that is part of another token, stay cold.
    """

    def after(state: str, text: str) -> str:
        if text == "\n":
            return "newline"
        return "indented" if text in ("\t", "    ") and state != "other" else "other"

    return TokenRule(
        start="other",
        inside="other",
        after=after,
        hot=lambda state: state == "indented",
        reduce=lambda text: text if text in ("\n", "\t", "    ") else "x",
    )


def rule_for(scope: str, language: str) -> TokenRule:
    """The rule of a scope, one of `SCOPES`.

    Raises:
        ValueError: an unknown scope.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")
    if scope == "block":
        return block_rule(language)
    return reference_rule() if scope == "reference" else line_rule(column_zero=scope == "line+col0")
