"""Execution of programs that nobody has read: each in a process of its own, confined, limited and then gone.

    sandbox = Sandbox(allow_execution=True)
    sandbox.run("assert 1 + 1 == 3")        # Outcome(outcome="wrong", detail="AssertionError: ", seconds=0.06)
    sandbox.run_all(programs, workers=2)    # the outcomes in the order of the programs

What holds depends on what the machine allows (`Sandbox.isolation`, `docs/code_evaluation.md`):

- `"namespaces"` (Linux, as root or where users may make namespaces): the kernel gives the program no network, no view of
  other processes, a file system that is read-only but for its own folder in memory, and no rights.
- `"guard"`: an audit hook in the interpreter refuses network, other processes and writes outside a temporary folder.
  It stops accidents, not attacks.

Whether a program passed is decided outside its process.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from .run_folder import remove_leftovers, run_folder

logger = logging.getLogger(__name__)

OUTCOMES = ("passed", "wrong", "syntax", "name", "type", "other", "timeout", "memory", "killed")
"""How a program can end. `wrong` is an AssertionError, `syntax` a SyntaxError or IndentationError, `name` a NameError,
`type` a TypeError, `other` any further exception, SystemExit among them; `killed` is a process that was gone before its
tests were done."""

ISOLATIONS = ("auto", "namespaces", "guard")
_FAILURES = ("wrong", "syntax", "name", "type", "memory", "other")  # those that an exception tells
_VERDICT_BYTES = 1 << 16
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
    namespaces = isolation == "namespaces"
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        folder = None if namespaces else stack.enter_context(run_folder())
        job = {
            **asdict(limits),
            "source": source,
            "namespaces": namespaces,
            "folder": folder,
            "number": secrets.randbelow(1 << 27),
        }
        # -I but for the hash seed: sets iterate in the same order in every run.
        process = subprocess.Popen(
            [sys.executable, "-S", "-s", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder or "/",
            env={"PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"},
            start_new_session=True,
            bufsize=0,
        )
        stack.callback(process.stdin.close)  # open until then: its end tells the child that this process is gone
        stack.callback(process.stdout.close)
        timed_out = False
        try:
            with contextlib.suppress(BrokenPipeError):  # the child is gone, and without a verdict; `_judge` says so
                _write_all(process.stdin, json.dumps(job).encode() + b"\n")
            process.wait(limits.wall_seconds)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)  # still ours: it has not been waited for
                process.wait()
        # One read of what is there: the writer has ended, and no program holds this pipe.
        os.set_blocking(process.stdout.fileno(), False)
        verdict = process.stdout.read(_VERDICT_BYTES) or b""
    return Outcome(*_judge(verdict, timed_out, limits), time.perf_counter() - started)


def _write_all(file, data: bytes) -> None:
    while data:
        data = data[file.write(data) :]


def _judge(verdict: bytes, timed_out: bool, limits: Limits) -> tuple[str, str]:
    """Outcome and detail from the verdict of the process that started the program."""
    if timed_out:
        return "timeout", f"stopped after {limits.wall_seconds} s"
    try:
        said = json.loads(verdict)
    except ValueError:
        raise SandboxError(f"the sandbox's own process failed; its verdict is {verdict[-200:]!r}") from None
    if "setup" in said:
        raise SandboxError(f"a program could not be confined on this machine: {said['setup']}")
    if said["passed"]:
        return "passed", ""
    if said["kind"] in _FAILURES:
        return said["kind"], said["detail"]
    if said["ended"] == 128 + signal.SIGXCPU:
        return "timeout", f"used {limits.cpu_seconds} s of processor time"
    return "killed", f"ended with status {said['ended']} before its tests were done"


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
        remove_leftovers()
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
