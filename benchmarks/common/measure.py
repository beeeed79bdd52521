"""What the benchmarks measure with: peak memory, the machine, files written whole."""

from __future__ import annotations

import ctypes
import gc
import io
import json
import os
import platform
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


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


def save_figure(figure, path: Path) -> Path:
    """Write a matplotlib figure as PNG, whole or not at all, and close it."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    plt.close(figure)
    write_whole(path, buffer.getvalue())
    return path


class ResultFile:
    """A JSON file of results: parts by name, each with the machine and the arguments it was made with.

    Args:
        path: the file; what it holds is kept unless `fresh`.
        device: what new parts are made on.
    """

    def __init__(self, path: Path, device: torch.device, fresh: bool):
        self.path, self.device = path, device
        self.parts: dict[str, dict] = json.loads(path.read_text()) if path.exists() and not fresh else {}

    def begun(self, part: str, used: dict) -> dict:
        """What is there of a part that was made with the same arguments."""
        found = self.parts.get(part, {})
        return found.get("result", {}) if found.get("arguments") == used else {}

    def put(self, part: str, used: dict, result: dict) -> None:
        self.parts[part] = {**environment(self.device), "arguments": used, "result": result}
        write_json(self.path, self.parts)

    def results(self) -> dict[str, dict]:
        return {part: entry["result"] for part, entry in self.parts.items()}
