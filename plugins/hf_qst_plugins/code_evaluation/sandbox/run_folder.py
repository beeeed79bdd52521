"""The temporary folder of one program, and removal of folders that killed evaluations left behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "hf_qst_run_"


@contextlib.contextmanager
def run_folder() -> Iterator[str]:
    """A new folder, removed afterwards. This process holds a lock on it, which the kernel releases if the process is
    killed; `remove_leftovers` removes folders without a lock."""
    while True:
        path = tempfile.mkdtemp(prefix=PREFIX)
        handle = _locked(path)
        if handle is not None and os.path.isdir(path):
            break
        if handle is not None:  # another process removed the folder before it was locked
            os.close(handle)
    try:
        yield path
    finally:
        _remove(path)
        os.close(handle)


def remove_leftovers() -> None:
    """Remove this user's folders that no running process holds."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            status = path.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                continue
            if not status.st_mode & stat.S_IRUSR:  # the program may have removed the right
                path.chmod(0o700)
        except FileNotFoundError:
            continue  # another process removed it meanwhile
        handle = _locked(path, wait=False)
        if handle is not None:
            _remove(path)
            os.close(handle)


def _locked(path: str | Path, wait: bool = True) -> int | None:
    """A descriptor of the locked folder; None if the folder is gone or, without `wait`, if it is in use."""
    import fcntl  # POSIX only, like the sandbox

    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


def _remove(path: str | Path) -> None:
    """Remove a folder, also if the program removed its own rights in it."""
    shutil.rmtree(path, ignore_errors=True)
    if not os.path.isdir(path):
        return
    os.chmod(path, 0o700)
    for folder, names, _ in os.walk(path):
        for name in names:
            inner = os.path.join(folder, name)
            if not os.path.islink(inner):
                os.chmod(inner, 0o700)  # before os.walk goes into it
    shutil.rmtree(path, ignore_errors=True)
