"""Runs one command: messages, errors of one line, exit codes."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from importlib import import_module

from .arguments import Arguments
from .errors import UsageError, one_line, option_of
from .folders import discard_checkpoints, last_checkpoint
from .job import Job


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command in the same way as an interrupt."""


def run(name: str, description: str, argv: Sequence[str]) -> int:
    """Run one command; returns the exit code."""
    with _terminable():
        return _run(name, description, argv)


@contextmanager
def _terminable():
    """SIGTERM raises `Terminated` meanwhile."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _run(name: str, description: str, argv: Sequence[str]) -> int:
    verbose, job = "--verbose" in argv, None
    try:
        if not verbose:
            _quiet()
        # From here on torch is loaded, which takes seconds.
        command = import_module(f"{__package__}.{name.replace('-', '_')}")
        record_of = import_module(f"{__package__}.record")
        arguments = Arguments(name, f"{description}.\n\n{command.__doc__}")
        arguments.flag("dry_run", "Check everything, say what would be done, and stop.")
        command.add_arguments(arguments)
        options = arguments.parse(argv)
        job = command.prepare(options)
        if options.dry_run:
            print("\n".join(job.plan()))
            return 0
        record = record_of.Record(name, argv, options.as_dict())
        if job.checkpoints and not options.resume:
            discard_checkpoints(job.output_dir)
        job.work(record)
        if job.output_dir:
            report = record.finish(job.output_dir)
            print("\n".join([*record_of.summary(record.content), f"report: {report}"]))
        return 0
    except KeyboardInterrupt as stop:
        ended, code = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
        print(f"\nhf-qst {name}: {ended}. {_how_to_go_on(job)}", file=sys.stderr)
        return code
    except UsageError as error:
        return _failed(name, 2, str(error), verbose)
    except Exception as error:
        option = option_of(error) if isinstance(error, ValueError) else None
        message = f"--{option}: {one_line(error)}" if option else f"{type(error).__name__}: {one_line(error)}"
        return _failed(name, 2 if option else 1, message, verbose)


def _failed(name: str, code: int, message: str, verbose: bool) -> int:
    if verbose:
        import traceback

        traceback.print_exc()
    print(f"hf-qst {name}: {message}", file=sys.stderr)
    return code


def _how_to_go_on(job: Job | None) -> str:
    if job is None:
        return "Nothing was written."
    if not job.checkpoints:
        return "This command has no checkpoints."
    checkpoint = last_checkpoint(job.output_dir)
    if checkpoint is None:
        return "There is no whole checkpoint yet."
    return f"The last whole checkpoint is {checkpoint}; the same command with --resume goes on from it."


def _quiet() -> None:
    """Only errors of the libraries; what this package says stays."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
