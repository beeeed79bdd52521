"""The JSON of what a command did, and the report made of it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from hf_qst.saved import write_text
from hf_qst_plugins.report import write_report

RECORD_NAME = "hf_qst_run.json"
REPORT_NAME = "report.html"
PACKAGES = ("hf_qst", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "trl", "lm_eval")


class Record:
    """What a command did, as it is found out.

    Args:
        command (`str`): name of the command.
        argv (`Sequence[str]`): its arguments.
        options (`dict`): the value of every option.

    Attributes:
        content (`dict`): JSON-ready; commands add what they measured.
    """

    def __init__(self, command: str, argv: Sequence[str], options: dict):
        self._started = time.perf_counter()
        self.content = {
            "format": 1,
            "command": command,
            "command_line": shlex.join(["hf-qst", command, *argv]),
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": versions(),
            "commit": commit(),
            "machine": machine(),
            "options": options,
        }

    def finish(self, folder: str) -> Path:
        """Write the record and its report into a folder; returns the path of the report."""
        self.content["seconds"] = round(time.perf_counter() - self._started, 2)
        os.makedirs(folder, exist_ok=True)
        write_text(Path(folder) / RECORD_NAME, json.dumps(self.content, indent=1, allow_nan=False) + "\n")
        report = Path(folder) / REPORT_NAME
        write_report(self.content, report)
        return report


def summary(content: dict) -> list[str]:
    """Lines for the terminal: what changed from before to after."""
    if "after" not in content:
        return []
    before, after = content["before"], content["after"]
    lines = [f"{name}: {before[name]:,} before, {after[name]:,} after" for name in ("parameters", "bytes")]
    for name, figures in after["perplexity"].items():
        text = name.replace("_", " ")
        lines.append(
            f"perplexity, {text}: {before['perplexity'][name]['perplexity']:.4f} before, {figures['perplexity']:.4f} after"
        )
    return lines


def versions() -> dict[str, str]:
    """Of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the package's source, with a `+` if files differ from it; None where it is not in a git repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, timeout=10)
        if tracked.returncode:
            return None
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head + ("+" if changed.strip() else "") if head else None


def machine() -> dict[str, str | int]:
    """Processor, cores that this process may use, and GPU."""
    found: dict[str, str | int] = {"platform": platform.platform(), "processor": _processor(), "cores": _cores()}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
