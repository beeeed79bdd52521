"""Execution of untrusted programs, each in a confined and limited process of its own.

    sandbox = Sandbox(allow_execution=True)
    sandbox.run("assert 1 + 1 == 3")        # Outcome(outcome="wrong", detail="AssertionError: ", seconds=0.06)
    sandbox.run_all(programs, workers=2)    # the outcomes in the order of the programs

There are two isolations (`docs/code_evaluation.md` says what each guarantees):

- `"namespaces"` (Linux, as root or where users may create namespaces): the kernel gives the program no network, no view
  of other processes, no rights, and a file system that is read-only except for a folder in memory.
- `"guard"`: an audit hook in the interpreter refuses network, other processes and writes outside a temporary folder.
  It stops accidents, not attacks.

The verdict on a program is made outside its process.
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

from hf_qst.tuner.config import is_count

from .run_folder import remove_leftovers, run_folder

logger = logging.getLogger(__name__)

OUTCOMES = ("passed", "wrong", "syntax", "name", "type", "other", "timeout", "memory", "killed")
"""How a program can end. `wrong` is an AssertionError, `syntax` a SyntaxError, `name` a NameError, `type` a TypeError,
`other` any other exception, SystemExit included; `killed` is a process that ended before its tests were done."""

ISOLATIONS = ("auto", "namespaces", "guard")
_FAILURES = ("wrong", "syntax", "name", "type", "memory", "other")  # outcomes that an exception decides
_VERDICT_BYTES = 1 << 16
_CHILD = Path(__file__).with_name("confined_process.py")


class ExecutionNotAllowedError(PermissionError):
    """The caller did not allow the execution of generated programs."""


class SandboxError(RuntimeError):
    """The sandbox could not be set up. This says nothing about the program."""


@dataclass(frozen=True)
class Limits:
    """Limits of one program.

    Args:
        wall_seconds: time from the start of its interpreter to its end.
        cpu_seconds: processor time per process.
        memory_bytes: address space per process.
        file_bytes: size of one file.
        folder_bytes: size of all files (`"namespaces"`; with `"guard"` the limit is 256 changes to files).
        processes: processes at one time (`"namespaces"`; with `"guard"` it may start none).
    """

    wall_seconds: int = 10
    cpu_seconds: int = 5
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 20
    folder_bytes: int = 16 << 20
    processes: int = 32

    def __post_init__(self):
        for name, value in asdict(self).items():
            if not is_count(value):
                raise ValueError(f"Limits.{name} must be a whole number of at least 1, got {value!r}")


class Outcome(NamedTuple):
    """One of `OUTCOMES`, the exception or the reason in one line, and wall-clock seconds."""

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
        # Like -I, but with a hash seed: sets iterate in the same order in every run.
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
        stack.callback(process.stdin.close)  # when it closes, the child knows that this process is gone
        stack.callback(process.stdout.close)
        timed_out = False
        try:
            with contextlib.suppress(BrokenPipeError):  # the child ended without a verdict; `_judge` reports that
                _write_all(process.stdin, json.dumps(job).encode() + b"\n")
            process.wait(limits.wall_seconds)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)  # the id is still valid: nobody has waited for the process
                process.wait()
        # One read is enough: the writer has ended, and no program has this pipe.
        os.set_blocking(process.stdout.fileno(), False)
        verdict = process.stdout.read(_VERDICT_BYTES) or b""
    return Outcome(*_judge(verdict, timed_out, limits), time.perf_counter() - started)


def _write_all(file, data: bytes) -> None:
    while data:
        data = data[file.write(data) :]


def _judge(verdict: bytes, timed_out: bool, limits: Limits) -> tuple[str, str]:
    """Outcome and detail from the verdict that `confined_process.py` wrote."""
    if timed_out:
        return "timeout", f"stopped after {limits.wall_seconds} s"
    try:
        judged = json.loads(verdict)
    except ValueError:
        raise SandboxError(f"the sandbox's own process failed; its verdict is {verdict[-200:]!r}") from None
    if "setup" in judged:
        raise SandboxError(f"a program could not be confined on this machine: {judged['setup']}")
    if judged["passed"]:
        return "passed", ""
    if judged["kind"] in _FAILURES:
        return judged["kind"], judged["detail"]
    if judged["ended"] == 128 + signal.SIGXCPU:
        return "timeout", f"used {limits.cpu_seconds} s of processor time"
    return "killed", f"ended with status {judged['ended']} before its tests were done"


@functools.cache
def _strongest_isolation() -> str:
    """`"namespaces"` if a program runs in them here, else `"guard"` with one warning."""
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
    """Runs each program in a confined process.

    Args:
        allow_execution: must be True, because the programs are untrusted code.
        limits: of each program.
        isolation: `"namespaces"`, `"guard"`, or `"auto"` for the stronger one that works here.

    Raises:
        ExecutionNotAllowedError: `allow_execution` is not True.
        ValueError: `isolation` is unknown.
        SandboxError: not a POSIX system; raised by `run` if `"namespaces"` does not work here.
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
        """Execute one program. It passes if it runs to its end without an exception."""
        if not isinstance(source, str):
            raise ValueError(f"source must be the text of a program, got {type(source).__name__}")
        return _execute(source, self.limits, self.isolation)

    def run_all(self, sources: Iterable[str], workers: int | None = None) -> Iterator[Outcome]:
        """Outcomes in the order of the programs; `workers` run at a time (default: one per processor)."""
        if workers is not None and not is_count(workers):
            raise ValueError(f"workers must be a whole number of at least 1, got {workers!r}")
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            yield from pool.map(self.run, sources)
