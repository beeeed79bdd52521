"""The call of a decoder block, as its hooks see it."""

from __future__ import annotations

from collections.abc import Callable

import torch


def with_first_argument(args: tuple, kwargs: dict, change: Callable) -> tuple[tuple, dict]:
    """The arguments of a call with the first, or the one named `hidden_states`, replaced by `change` of it."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}


def hidden_of(output) -> torch.Tensor:
    """The hidden state in what a block returns: itself, or the first of a tuple or a list."""
    return output[0] if isinstance(output, (tuple, list)) else output
