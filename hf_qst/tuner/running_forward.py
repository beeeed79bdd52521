"""What a wrapped stack's forward hands to the hooks in its blocks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


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
