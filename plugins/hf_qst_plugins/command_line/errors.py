"""Errors of the command line."""

from __future__ import annotations

import re

# How the package names a value: DISPConfig.keep_ratio must be ..., MixedRankConfig.allocation.allocator must be ...
_FIELD = re.compile(r"\b\w*Config\.([a-z_]+(?:\.[a-z_]+)*)")
_ARGUMENT = re.compile(r"^([a-z_]+)(?: must|=)")


class UsageError(Exception):
    """Wrong usage: the message is one line, and begins with the option where there is one."""

    def __init__(self, option: str | None, message: object):
        text = one_line(message)
        super().__init__(f"--{option}: {text}" if option else text)


def one_line(message: object) -> str:
    """A message without line breaks."""
    return " ".join(str(message).split()) or "no message"


def option_of(message: object) -> str | None:
    """The option whose value an error is about, if it is the error of a configuration class or names an argument."""
    found = _FIELD.search(str(message)) or _ARGUMENT.match(str(message))
    return found.group(1) if found else None


def field_sentence(message: object) -> str:
    """Of a message of several lines, the one that names a configuration's field; else all of it, in one line."""
    lines = [line.strip(" -") for line in str(message).splitlines()]
    return next((line for line in lines if _FIELD.search(line)), one_line(message))
