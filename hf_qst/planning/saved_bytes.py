"""Counts the bytes a training step keeps for its backward pass, on any device.

    with SavedForBackward(model) as saved:
        loss = model(**batch).loss
        at_end_of_forward = saved.live
        loss.backward()
    saved.peak

An allocator's peak includes everything; this counts only what autograd keeps. So methods can be compared without the
memory of the base, and on a CPU, where no allocator reports.
"""

from __future__ import annotations

import torch
import torch.utils.checkpoint
from torch.multiprocessing.reductions import StorageWeakRef


class _Kept:
    """Held by autograd in place of a saved tensor; deleted when autograd releases the tensor."""

    __slots__ = ("counter", "key", "tensor")

    def __init__(self, counter: SavedForBackward, key: int, tensor: torch.Tensor):
        self.counter, self.key, self.tensor = counter, key, tensor

    def __del__(self):
        self.counter._release(self.key)


class SavedForBackward:
    """Counts the bytes autograd keeps for the backward pass, as they come and go.

    Each storage counts once, however many views of it are saved. Parameters and buffers of `model` do not count. Tensors
    that a checkpointed block saves during its recomputation count while they live.

    Attributes:
        live (`int`): bytes kept now.
        peak (`int`): most bytes kept at any time so far.
    """

    def __init__(self, model: torch.nn.Module):
        fixed = [*model.parameters(), *model.buffers()]
        self._excluded = {tensor.untyped_storage()._cdata for tensor in fixed}
        self._kept: dict[int, list[int]] = {}  # storage: [number of savings, bytes]
        self._recomputed: dict[int, tuple[StorageWeakRef, int]] = {}
        self._kept_bytes = 0
        self.peak = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: getattr(kept, "tensor", kept))

    @property
    def live(self) -> int:
        for key, (reference, _) in list(self._recomputed.items()):
            if reference.expired():
                del self._recomputed[key]
        return self._kept_bytes + sum(n for key, (_, n) in self._recomputed.items() if key not in self._kept)

    def _pack(self, tensor: torch.Tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._excluded:
            return tensor
        entry = self._kept.setdefault(key, [0, storage.nbytes()])
        if entry[0] == 0:
            self._kept_bytes += entry[1]
        entry[0] += 1
        self.peak = max(self.peak, self.live)
        # Detached, because an operation that saves its own output would otherwise keep itself alive.
        return _Kept(self, key, tensor.detach())

    def _release(self, key: int) -> None:
        entry = self._kept[key]
        entry[0] -= 1
        if entry[0] == 0:
            self._kept_bytes -= entry[1]
            del self._kept[key]

    def _recompute(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._excluded:
            self._recomputed[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            self.peak = max(self.peak, self.live)

    def __enter__(self) -> SavedForBackward:
        # A checkpointed block uses torch's own hooks during its recomputation, so those are wrapped.
        counter, original = self, torch.utils.checkpoint._recomputation_hook

        class Watched(original):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                pack = self.pack_hook

                def watch(tensor):
                    counter._recompute(tensor)
                    return pack(tensor)

                self.pack_hook = watch

        self._original = original
        torch.utils.checkpoint._recomputation_hook = Watched
        self._hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._hooks.__exit__(*error)
        torch.utils.checkpoint._recomputation_hook = self._original
