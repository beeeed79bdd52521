"""Several gloo processes of one group."""

from __future__ import annotations

import os
import socket
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.child_processes import CHILD

_PATIENCE = timedelta(seconds=300)


def in_processes(count: int, function, directory: Path, *args, environment: dict[str, str] | None = None) -> list:
    """Results of `function(*args)` in each of `count` processes of one group, by rank.

    Args:
        function: of a module; what it returns is written by `torch.save`.
        directory: for results and errors.
        environment: variables that a launcher sets.

    Raises:
        RuntimeError: with the traceback of the process that failed first; the others are ended.
    """
    try:
        return _tried(count, function, directory, args, environment or {})
    except RuntimeError as error:
        # Somebody took the port that was free, or gloo's first connection failed: nothing that is tested here.
        if "DistNetworkError" not in str(error):
            raise
        return _tried(count, function, directory, args, environment or {})


def _tried(count: int, function, directory: Path, args: tuple, environment: dict[str, str]) -> list:
    directory.mkdir(parents=True, exist_ok=True)
    for left in directory.glob("error.*"):
        left.unlink()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [
        CHILD.Process(target=_run, args=(rank, count, port, function, directory, args, environment))
        for rank in range(count)
    ]
    for process in started:
        process.start()
    end = time.monotonic() + _PATIENCE.total_seconds()
    try:
        while any(process.is_alive() for process in started) and time.monotonic() < end:
            if any(process.exitcode for process in started):
                break
            time.sleep(0.02)
        failed = [rank for rank, process in enumerate(started) if process.exitcode != 0]
    finally:
        for process in started:
            process.kill()
            process.join()
    if failed:
        errors = [directory / f"error.{rank}" for rank in range(count)]
        told = sorted((path for path in errors if path.exists()), key=lambda path: path.stat().st_mtime_ns)
        text = told[0].read_text() if told else f"processes {failed} ended without a result"
        raise RuntimeError(text)
    return [torch.load(directory / f"result.{rank}", weights_only=False) for rank in range(count)]


def _run(rank: int, count: int, port: int, function, directory: Path, args: tuple, environment: dict) -> None:
    torch.set_num_threads(1)
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({**environment, **{name: str(value) for name, value in own.items()}})
    try:
        dist.init_process_group("gloo", timeout=_PATIENCE)
        torch.save(function(*args), directory / f"result.{rank}")
        # The others may still need this one. The group is not destroyed: with work just done gloo's end sometimes hangs.
        dist.barrier()
    except BaseException:
        (directory / f"error.{rank}").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)
