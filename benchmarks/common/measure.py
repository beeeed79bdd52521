"""Peak memory, the machine a benchmark ran on, and its files."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch

from hf_qst.saved import write_text

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


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


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag}" in flags]
    return f"{names[0] if names else platform.processor()} ({', '.join(known)})"


def commit() -> str:
    """The commit of the working tree, with a mark if tracked files differ from it; `HF_QST_COMMIT` names it for a copy
    without a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("HF_QST_COMMIT", "unknown")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"  # installed under another name


def environment(device: torch.device) -> dict:
    """Versions, commit, machine and driver, as they go into every result file."""
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    packages = ("torch", "triton", "transformers", "peft", "bitsandbytes", "accelerate", "liger_kernel")
    versions = {name: _version(name) for name in packages if find_spec(name)}
    where = {"versions": {"python": platform.python_version(), **versions}, "commit": commit(), "machine": machine}
    if device.type != "cuda":
        return where
    machine["gpu"] = torch.cuda.get_device_name(device)
    machine["gpu_memory"] = torch.cuda.get_device_properties(device).total_memory
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return {**where, "driver": driver, "cuda": torch.version.cuda}


def message(error: BaseException) -> str:
    """The reason of a failed row: the error's class and its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")


def python_path() -> str:
    """Where this project's packages lie, before what was set."""
    return os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])


def hashes_of(files: Iterable[Path], root: Path) -> dict[str, str]:
    """SHA-256 of each file by its name from `root`, by which a result shows whether it is of these sources."""
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def write_json(path: Path, value: object) -> None:
    """Write `value` to `path`, whose folder is made."""
    text = json.dumps(value, indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
