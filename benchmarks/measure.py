"""What the benchmarks measure with: saved-for-backward bytes, peak memory, the machine, files written whole.

with SavedForBackward(model) as saved:
    loss = model(**batch).loss
    at_end_of_forward = saved.live
    loss.backward()
saved.peak
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch
import torch.utils.checkpoint
from torch.multiprocessing.reductions import StorageWeakRef

ROOT = Path(__file__).resolve().parents[1]


class _Kept:
    """What autograd holds in place of a saved tensor; its end is the end of the tensor's saving."""

    __slots__ = ("counter", "key", "tensor")

    def __init__(self, counter: SavedForBackward, key: int, tensor: torch.Tensor):
        self.counter, self.key, self.tensor = counter, key, tensor

    def __del__(self):
        self.counter._release(self.key)


class SavedForBackward:
    """Counts the bytes autograd keeps for the backward pass, as they come and go.

    Each storage counts once, whatever number of views of it are saved; parameters and buffers of `model` do not count.
    What a checkpointed block saves again while it is recomputed counts while it lives.

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
        return _Kept(self, key, tensor)

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
        # Inside a checkpointed block torch's own hooks are in force, so its recomputation has to be watched there.
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


# --- memory of the process and the device ----------------------------------------------------------------------------


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


def settle_rss() -> int:
    """Give freed memory back to the system, restart the peak where Linux allows it; returns the bytes resident now."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    except (AttributeError, OSError):
        pass  # not Linux with glibc: the peak then includes loading
    return _status("VmRSS") or peak_rss()


def peak_rss() -> int:
    """Most bytes this process had resident since `settle_rss`, or since its start where that cannot restart it."""
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- where and with what it ran --------------------------------------------------------------------------------------


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag}" in flags]
    return f"{names[0] if names else platform.processor()} ({', '.join(known)})"


def commit() -> str:
    """The commit of the working tree, with a mark if tracked files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment(device: torch.device) -> dict:
    """Versions, commit and machine, as they go into every result file."""
    machine = {"cpu": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
        machine["gpu_memory"] = torch.cuda.get_device_properties(device).total_memory
    packages = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
    versions = {name: metadata.version(name) for name in packages}
    return {"versions": {"python": platform.python_version(), **versions}, "commit": commit(), "machine": machine}


def write_whole(path: Path, data: bytes) -> None:
    """Write beside `path` and rename, so that a run cut short never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    write_whole(path, (json.dumps(value, indent=1) + "\n").encode())
