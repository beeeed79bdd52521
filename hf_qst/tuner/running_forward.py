"""What a wrapped stack's forward hands to the hooks in its blocks, and to what runs in their place."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


class RunningForward(threading.local):
    """The value of the forward that runs in this thread; `current` is None outside one."""

    def __init__(self):  # in each thread; under torch.compile a default of the class would not do
        self.current = None

    def __reduce__(self):
        # A copy of a model starts without a running forward.
        return type(self), ()

    @contextmanager
    def using(self, value) -> Iterator[None]:
        """Set `current` inside a `with` block."""
        before, self.current = self.current, value
        try:
            yield
        finally:
            self.current = before


class ForwardInPlace:
    """What is called instead of a block's forward, as `block.forward`, and calls it as `self.forward`.

    Several may lie around one block. `remove()` takes this one away, whatever the order.
    """

    def __init__(self, block: nn.Module, tape: RunningForward):
        self.block, self.tape = block, tape
        self.own = "forward" in block.__dict__
        self.forward = block.forward
        block.forward = self

    def remove(self) -> None:
        outer = self.block.__dict__.get("forward")
        while isinstance(outer, ForwardInPlace) and outer is not self:
            if outer.forward is self:
                outer.forward, outer.own = self.forward, self.own
            outer = outer.forward
        if outer is self:
            del self.block.forward
            if self.own:
                self.block.forward = self.forward
