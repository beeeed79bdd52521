"""States of examples in a folder of memory-mapped safetensors files, which several processes fill and read.

A shard is written once, whole or not at all, under a name of its own; nothing is ever changed or locked. It names its
examples itself, so there is no index that could disagree with it: `keys` uint8 [n, 16], `starts` int64 [n + 1] (example i
has the tokens starts[i] to starts[i + 1] of each part) and `sums` int64 [n], the checksum of each example. An example whose
checksum is wrong when this process first reads it is not used.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
import weakref
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from hf_qst.saved.manifest import CheckpointError, read_tensors
from hf_qst.saved.whole_files import whole_file

logger = logging.getLogger(__name__)

Parts = dict[str, torch.Tensor]

SHARD_BYTES = 64 * 2**20
# Examples wait for a full shard no longer than this, so that other processes find them and little is lost with this one.
_SECONDS = 30
_ABANDONED_SECONDS = 3600
_TICK_NS = 10**8


@dataclass
class Counts:
    """What became of the examples that were asked for, and what this process has written.

    `damaged` counts stored examples, and shards that cannot be opened at all.
    """

    found: int = 0
    missing: int = 0
    damaged: int = 0
    stored: int = 0
    bytes_written: int = 0


class ShardWriter:
    """Collects examples and writes them as shards, the last when it goes or its process ends.

    Args:
        folder: of states that fit each other.
        root: the folder whose bytes `size_limit` is of.
        size_limit: bytes; None for none.
        parts: names of the tensors of each example.
        counts: is added to.
        shard_bytes: of the examples in a full shard.
    """

    def __init__(
        self, folder: Path, root: Path, size_limit: int | None, parts: Sequence[str], counts: Counts, shard_bytes: int
    ):
        self.folder, self.root, self.size_limit, self.parts = folder, root, size_limit, tuple(parts)
        self.counts, self.shard_bytes = counts, shard_bytes
        self.accepts = True  # until the disk or the limit is reached
        self.waiting: dict[bytes, Parts] = {}
        self._bytes, self._since, self._process = 0, 0.0, os.getpid()

    def put(self, key: bytes, parts: Parts) -> None:
        """Keep an example [tokens, width], with others in a shard that is written when it is full."""
        if not self.accepts:
            return
        self._since = self._since if self.waiting else time.monotonic()
        self.waiting[key] = parts
        self._bytes += sum(part.nbytes for part in parts.values())
        if self._bytes >= self.shard_bytes or time.monotonic() - self._since > _SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what waits. A full disk ends the writing with one warning, not the training."""
        if not self.waiting or os.getpid() != self._process:  # a forked process does not write what its parent will
            return
        try:
            self._write()
        except (OSError, SafetensorError) as error:
            self._stop(f"cannot write to {self.folder} ({error})")
        self.waiting.clear()
        self._bytes = 0

    def _write(self) -> None:
        examples = list(self.waiting.values())
        lengths = [len(parts[self.parts[0]]) for parts in examples]
        tensors = {name: torch.cat([parts[name] for parts in examples]) for name in self.parts}
        tensors["keys"] = torch.tensor([list(key) for key in self.waiting], dtype=torch.uint8)
        tensors["starts"] = torch.tensor([0, *lengths]).cumsum(0)
        tensors["sums"] = torch.tensor([checksum(key, parts) for key, parts in self.waiting.items()])
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self.size_limit is not None and folder_bytes(self.root) + size > self.size_limit:
            self._stop(f"{self.root} has reached its size_limit of {self.size_limit:,} bytes")
            return
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        with whole_file(path) as temporary:
            save_file(tensors, temporary)
        self.counts.stored += len(examples)
        self.counts.bytes_written += path.stat().st_size

    def _stop(self, why: str) -> None:
        self.accepts = False
        logger.warning(
            "hidden-state cache: %s. What is stored is used; for other examples the base runs in every epoch", why
        )


class Shards:
    """The shards in `folder`, which is made; arguments as of `ShardWriter`."""

    def __init__(
        self,
        folder: Path,
        root: Path,
        size_limit: int | None,
        parts: Sequence[str],
        counts: Counts,
        shard_bytes: int = SHARD_BYTES,
    ):
        self.folder, self.parts, self.counts = folder, tuple(parts), counts
        self.writer = ShardWriter(folder, root, size_limit, parts, counts, shard_bytes)
        weakref.finalize(self, self.writer.flush)
        self._shards: dict[str, Parts | None] = {}
        self._places: dict[bytes, list[tuple[str, int]]] = {}
        self._verified: set[tuple[str, int]] = set()
        self._seen_at = -1
        folder.mkdir(parents=True, exist_ok=True)
        self._remove_abandoned()
        self.refresh()

    def __len__(self) -> int:
        return len(self._places.keys() | self.writer.waiting.keys())

    def refresh(self) -> None:
        """Look for shards that were written since, by this process or others."""
        changed = self.folder.stat().st_mtime_ns
        if changed == self._seen_at:
            return
        # The clock of a file system is coarse: within the same tick there may be another shard.
        self._seen_at = changed if time.time_ns() - changed > _TICK_NS else -1
        for path in sorted(self.folder.glob("[!.]*.safetensors")):
            if path.name not in self._shards:
                self._shards[path.name] = self._opened(path)

    def _opened(self, path: Path) -> Parts | None:
        try:
            shard = read_tensors(str(path))
            keys, starts = shard["keys"], shard["starts"]
            fits = (
                keys.shape == (len(starts) - 1, 16)
                and len(shard["sums"]) == len(keys)
                and bool((starts.diff() > 0).all())
            )
            fits = fits and {starts[-1].item()} == {len(shard[name]) for name in self.parts} and starts[0].item() == 0
        except (CheckpointError, OSError, KeyError, IndexError) as error:
            return self._damaged(f"{path}: {error}")
        if not fits:
            return self._damaged(f"{path}: its tensors do not fit each other")
        for row, key in enumerate(keys.numpy()):
            self._places.setdefault(key.tobytes(), []).append((path.name, row))
        return shard

    def _damaged(self, what: str) -> None:
        if not self.counts.damaged:
            logger.warning("hidden-state cache: damaged, will be computed again: %s", what)
        self.counts.damaged += 1

    def get(self, key: bytes) -> Parts | None:
        """The parts [tokens, width] of an example, views of the mapped file; None if it is not there or damaged."""
        if key in self.writer.waiting:
            return self.writer.waiting[key]
        if not self._places.get(key):
            self.refresh()
        while places := self._places.get(key):
            name, row = place = places[-1]
            shard = self._shards[name]
            start, stop = shard["starts"][row : row + 2].tolist()
            parts = {part: shard[part][start:stop] for part in self.parts}
            if place in self._verified or checksum(key, parts) == shard["sums"][row].item():
                self._verified.add(place)
                return parts
            self._damaged(f"{self.folder / name}: example {row}")
            places.pop()
        return None

    def _remove_abandoned(self) -> None:
        """Remove what killed processes left half written."""
        for path in self.folder.glob(".tmp_*"):
            try:
                if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                    path.unlink()
            except FileNotFoundError:
                continue  # its writer has finished


def checksum(key: bytes, parts: Parts) -> int:
    """CRC-32 of an example's key, lengths and parts."""
    total = zlib.crc32(key)
    for name in sorted(parts):
        part = parts[name].contiguous()
        total = zlib.crc32(repr(tuple(part.shape)).encode(), total)
        total = zlib.crc32(memoryview(part.view(torch.uint8).numpy()), total)
    return total


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below `folder`; those that go meanwhile do not count."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total
