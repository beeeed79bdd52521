"""The call of a decoder block, as its hooks see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

_NAMES = ("hidden_states", "hidden_state")


def with_first_argument(args: tuple, kwargs: dict, change: Callable) -> tuple[tuple, dict]:
    """The arguments of a call with the state, which is the first or has its name, replaced by `change` of it."""
    name = next((name for name in _NAMES if name in kwargs), None)
    if name is None:
        return (change(args[0]), *args[1:]), kwargs
    return args, {**kwargs, name: change(kwargs[name])}


def first_argument(args: tuple, kwargs: dict):
    """The state in the arguments of a call: the first, or the one that has its name."""
    return next((kwargs[name] for name in _NAMES if name in kwargs), *args[:1])


def hidden_of(output) -> torch.Tensor:
    """The hidden state in what a block returns: itself, or the first of a tuple or a list."""
    return output[0] if isinstance(output, (tuple, list)) else output


def by_name(names: Sequence[str], args: tuple) -> dict:
    """Positional arguments by the names of a call's parameters. torch 2.9 fails to compile `zip(strict=False)`."""
    return {names[i]: value for i, value in enumerate(args[: len(names)])}
