"""Execution of programs that nobody has read: each in a process of its own, confined, limited and then gone.

    sandbox = Sandbox(allow_execution=True)
    sandbox.run("assert 1 + 1 == 3")        # Outcome(outcome="wrong", detail="AssertionError: ", seconds=0.06)
    sandbox.run_all(programs, workers=2)    # the outcomes in the order of the programs

What holds depends on what the machine allows (`Sandbox.isolation`, `docs/code_evaluation.md`):

- `"namespaces"` (Linux, as root or where users may make namespaces): the kernel gives the program no network, no view of
  other processes, a file system that is read-only but for its own folder in memory, and no rights.
- `"guard"`: an audit hook in the interpreter refuses sockets, other processes and writes outside a temporary folder.
  It stops accidents, not attacks.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)

OUTCOMES = ("passed", "wrong", "syntax", "name", "type", "other", "timeout", "memory", "killed")
"""How a program can end. `wrong` is an AssertionError, `syntax` a SyntaxError or IndentationError, `name` a NameError,
`type` a TypeError, `other` any further exception, SystemExit among them; `killed` is a process that was gone before its
tests were done."""

ISOLATIONS = ("auto", "namespaces", "guard")
_OF_EXCEPTION = (
    ("AssertionError", "wrong"),
    ("SyntaxError", "syntax"),
    ("NameError", "name"),
    ("TypeError", "type"),
    ("MemoryError", "memory"),
)
_CHILD = Path(__file__).with_name("sandbox_child.py")


class ExecutionNotAllowedError(PermissionError):
    """Generated programs are executed only for a caller who said so."""


class SandboxError(RuntimeError):
    """The sandbox itself could not be set up; no statement about a program."""


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Args:
        wall_seconds: from the start of its interpreter to its end.
        cpu_seconds: of processor time, a process.
        memory_bytes: of address space, a process.
        file_bytes: the largest file.
        folder_bytes: all its files together (with `"namespaces"`; otherwise 256 changes to files).
        processes: it and its children at one time (with `"namespaces"`; otherwise it may start none).
    """

    wall_seconds: int = 10
    cpu_seconds: int = 5
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 20
    folder_bytes: int = 16 << 20
    processes: int = 32

    def __post_init__(self):
        for name, value in asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"Limits.{name} must be a whole number of at least 1, got {value!r}")


class Outcome(NamedTuple):
    """How one program ended: one of `OUTCOMES`, the exception or the reason in a line, wall-clock seconds."""

    outcome: str
    detail: str
    seconds: float


def _execute(source: str, limits: Limits, isolation: str) -> Outcome:
    token = secrets.token_hex(16)
    job = {
        **asdict(limits),
        "source": source,
        "token": token,
        "namespaces": isolation == "namespaces",
        "number": secrets.randbelow(1 << 27),
    }
    started = time.perf_counter()
    # Files, not pipes: a program that fills, closes or keeps them open cannot make this process wait or grow.
    with (
        tempfile.TemporaryDirectory(prefix="hf_qst_", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as job_file,
        tempfile.TemporaryFile() as report_file,
    ):
        job_file.write(json.dumps(job).encode())
        job_file.seek(0)
        # -I but for the hash seed: sets iterate in the same order in every run.
        process = subprocess.Popen(
            [sys.executable, "-S", "-s", str(_CHILD)],
            stdin=job_file,
            stdout=report_file,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"},
            start_new_session=True,
        )
        timed_out = False
        try:
            process.wait(limits.wall_seconds)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)  # still ours: it has not been waited for
                process.wait()
        report_file.seek(0)
        report = report_file.read()
    return Outcome(*_judge(report, token, timed_out, limits), time.perf_counter() - started)


def _judge(report: bytes, token: str, timed_out: bool, limits: Limits) -> tuple[str, str]:
    """Outcome and detail from what the processes wrote; only a line with the token was written after the tests."""
    lines = report.split(b"\n")
    if timed_out:
        return "timeout", f"stopped after {limits.wall_seconds} s"
    if not lines[-1].startswith((b'{"ended"', b'{"setup"')):
        raise SandboxError(f"the sandbox's own process failed; its report is {report[-200:]!r}")
    last = json.loads(lines[-1])
    if "setup" in last:
        raise SandboxError(f"this machine does not allow the namespaces of isolation='namespaces': {last['setup']}")
    reported = next((line for line in lines if line.startswith(token.encode())), None)
    if reported is not None:
        result = json.loads(reported[len(token) :])
        if "setup" in result:
            raise SandboxError(f"a program could not be confined: {result['setup']}")
        if not result["raised"]:
            return "passed", ""
        outcome = next((value for name, value in _OF_EXCEPTION if name in result["raised"]), "other")
        return outcome, f"{result['raised'][0]}: {result['message']}"
    if last["ended"] == 128 + signal.SIGXCPU:
        return "timeout", f"used {limits.cpu_seconds} s of processor time"
    return "killed", f"ended with status {last['ended']} before its tests were done"


@functools.cache
def _strongest_isolation() -> str:
    """`"namespaces"` where a program runs in them, else `"guard"`, said once."""
    try:
        outcome = _execute("import math", Limits(), "namespaces")
        if outcome.outcome == "passed":
            return "namespaces"
        reason = str(outcome)
    except SandboxError as error:
        reason = str(error)
    logger.warning(
        "Generated programs will run under a guard inside the interpreter only, which stops accidents and not attacks: %s",
        reason,
    )
    return "guard"


class Sandbox:
    """Runs programs, each confined to its own process.

    Args:
        allow_execution: must be True: the programs are code that nobody has read.
        limits: what each may use.
        isolation: `"namespaces"`, `"guard"`, or `"auto"` for the stronger one that works here.

    Raises:
        ExecutionNotAllowedError: `allow_execution` is not True.
        ValueError: `isolation` is unknown.
        SandboxError: not a POSIX system; from `run`, `"namespaces"` was asked for where it is not allowed.
    """

    def __init__(self, *, allow_execution: bool = False, limits: Limits | None = None, isolation: str = "auto"):
        if allow_execution is not True:
            raise ExecutionNotAllowedError(
                f"allow_execution={allow_execution!r}: this would execute programs that a model generated, confined as "
                "docs/code_evaluation.md describes; pass allow_execution=True (--allow-execution) if you accept that"
            )
        if isolation not in ISOLATIONS:
            raise ValueError(f"isolation must be one of {', '.join(map(repr, ISOLATIONS))}, got {isolation!r}")
        if os.name != "posix":
            raise SandboxError(f"programs are executed on Linux and macOS only, this is {sys.platform!r}")
        self.limits = limits or Limits()
        self.isolation = _strongest_isolation() if isolation == "auto" else isolation

    def run(self, source: str) -> Outcome:
        """Execute one program; it passes when it runs to its end without an exception."""
        if not isinstance(source, str):
            raise ValueError(f"source must be the text of a program, got {type(source).__name__}")
        return _execute(source, self.limits, self.isolation)

    def run_all(self, sources: Iterable[str], workers: int | None = None) -> Iterator[Outcome]:
        """The outcomes of many programs in their order, `workers` at a time (default: one a processor)."""
        if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
            raise ValueError(f"workers must be a whole number of at least 1, got {workers!r}")
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            yield from pool.map(self.run, sources)
