"""The one way to write a file or a folder's files: whole or not at all.

A new file is written beside its place, under a name that begins with `.tmp_`, and renamed into it at the end. A run that
is killed leaves what was there before. The files of a folder are renamed one by one; a run that is killed between two of
them leaves the rest in a folder whose name begins with `.new_`, and whoever reads or writes there next moves them too
(`finish_interrupted`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_TEMPORARY, _COMPLETE, _REPLACED = ".tmp_", ".new_", ".replaced"
_ABANDONED_AFTER = 3600
"""Seconds after which what a process left is removed. Its number may mean another process in another container."""


def _prefix() -> str:
    return f"{_TEMPORARY}{socket.gethostname()}_{os.getpid()}_"


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[str]:
    """A temporary path with the suffix of `path`, whose file becomes `path` when the block ends without an error."""
    path = os.fspath(path)
    directory = os.path.dirname(path) or "."
    remove_abandoned(directory)
    handle, temporary = tempfile.mkstemp(dir=directory, prefix=_prefix(), suffix=os.path.splitext(path)[1])
    os.close(handle)
    try:
        yield temporary
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a UTF-8 text file."""
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)


@contextmanager
def whole_files(directory: str | os.PathLike, replaced: Callable[[str], bool] = lambda name: False) -> Iterator[str]:
    """A temporary folder, whose files all move to `directory`, which must exist, when the block ends without an error.

    Args:
        directory: where they go.
        replaced: of the names of files there, which are removed because no new file has that name.
    """
    directory = os.fspath(directory)
    finish_interrupted(directory)
    remove_abandoned(directory)
    with tempfile.TemporaryDirectory(dir=directory, prefix=_prefix()) as staging:
        yield staging
        new = set(os.listdir(staging))
        old = sorted(name for name in set(os.listdir(directory)) - new if replaced(name))
        with open(os.path.join(staging, _REPLACED), "w", encoding="utf-8") as file:
            file.write("\n".join(old))
        # From this renaming on, the new files count.
        complete = os.path.join(directory, _COMPLETE + os.path.basename(staging).removeprefix(_TEMPORARY))
        os.rename(staging, complete)
        os.mkdir(staging)  # what TemporaryDirectory is about to remove
    _move(complete, directory)


@contextmanager
def scratch_folder(directory: str | os.PathLike) -> Iterator[str]:
    """A temporary folder in `directory`, for what goes into its files later; gone when the block ends."""
    remove_abandoned(directory)
    with tempfile.TemporaryDirectory(dir=directory, prefix=_prefix()) as folder:
        yield folder


def finish_interrupted(directory: str | os.PathLike) -> bool:
    """Move the files of a save that was killed after all of them were written; whether there was one."""
    directory = os.fspath(directory)
    try:
        names = sorted(name for name in os.listdir(directory) if name.startswith(_COMPLETE))
    except (FileNotFoundError, NotADirectoryError):
        return False
    for name in names:
        _move(os.path.join(directory, name), directory)
    return bool(names)


def _move(complete: str, directory: str) -> None:
    """Another process may be doing the same: what it has moved is not there any more."""
    with contextlib.suppress(FileNotFoundError):
        with open(os.path.join(complete, _REPLACED), encoding="utf-8") as file:
            old = file.read().splitlines()
        for name in sorted(os.listdir(complete)):
            if name != _REPLACED:
                with contextlib.suppress(FileNotFoundError):
                    os.replace(os.path.join(complete, name), os.path.join(directory, name))
        for name in old:
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(directory, name))
        shutil.rmtree(complete, ignore_errors=True)


def remove_abandoned(directory: str | os.PathLike) -> None:
    """Remove what killed processes of this machine left unfinished in `directory`, if they ended long ago."""
    ours = f"{_TEMPORARY}{socket.gethostname()}_"
    for name in os.listdir(directory):
        owner = name.removeprefix(ours).partition("_")[0]
        if not name.startswith(ours) or not owner.isdigit() or _runs(int(owner)):
            continue
        path = os.path.join(directory, name)
        with contextlib.suppress(FileNotFoundError):
            if time.time() - os.path.getmtime(path) > _ABANDONED_AFTER:
                shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)


def is_empty(directory: str | os.PathLike) -> bool:
    """Whether a folder has nothing but what processes that were killed, or still run, have not finished."""
    return all(name.startswith(_TEMPORARY) for name in os.listdir(directory))


def _runs(process: int) -> bool:
    try:
        with contextlib.suppress(PermissionError):  # another user's, which runs too
            os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
