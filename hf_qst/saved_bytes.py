"""Counts the bytes a training step keeps for its backward pass, on any device.

An allocator's peak says how much was held; this says how much of it was held because of autograd, so methods can be
compared where no allocator reports (on a CPU) and without what the base itself takes.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch


class SavedBytes:
    """Context manager: bytes of the distinct storages autograd keeps alive while it is active.

    Storages that exist anyway (`exclude`, usually the model's parameters and buffers) do not count, nor does a storage
    kept by several nodes count twice. What a checkpointed region saves again when it is recomputed counts while it
    lives.

    Args:
        exclude: tensors that are not counted.

    Attributes:
        now (`int`): bytes alive at this moment.
        peak (`int`): the most there were at once.
        shapes (`list[tuple]`): (shape, dtype) of each storage's first tensor, in the order they were saved.
    """

    def __init__(self, exclude: Iterable[torch.Tensor] = ()):
        self._excluded = {tensor.untyped_storage().data_ptr() for tensor in exclude}
        self._users: dict[int, int] = {}
        self.now = self.peak = 0
        self.shapes: list[tuple[tuple[int, ...], torch.dtype]] = []

    def __enter__(self) -> SavedBytes:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda saved: saved.tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._hooks.__exit__(*exception)

    def _pack(self, tensor: torch.Tensor) -> _Saved:
        saved = _Saved(tensor)
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key in self._excluded or not size:
            return saved
        if key not in self._users:
            self._users[key] = 0
            self.now += size
            self.peak = max(self.peak, self.now)
            self.shapes.append((tuple(tensor.shape), tensor.dtype))
        self._users[key] += 1
        weakref.finalize(saved, self._free, key, size)
        return saved

    def _free(self, key: int, size: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self.now -= size


class _Saved:
    """A tensor autograd keeps, in an object whose end can be watched."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor
