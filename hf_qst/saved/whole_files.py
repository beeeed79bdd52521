"""The one way to write a file or a folder's files: whole or not at all.

A new file is written beside its place, under a name that begins with `.tmp_`, and renamed into it at the end. A run that
is cut short leaves what was there before.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[str]:
    """A temporary path with the suffix of `path`, whose file becomes `path` when the block ends without an error."""
    path = os.fspath(path)
    handle, temporary = tempfile.mkstemp(
        dir=os.path.dirname(path) or ".", prefix=".tmp_", suffix=os.path.splitext(path)[1]
    )
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
def whole_files(directory: str | os.PathLike) -> Iterator[str]:
    """A temporary folder, whose files all move to `directory`, which must exist, when the block ends without an error."""
    with tempfile.TemporaryDirectory(dir=directory, prefix=".tmp_") as staging:
        yield staging
        for name in sorted(os.listdir(staging)):
            os.replace(os.path.join(staging, name), os.path.join(directory, name))
