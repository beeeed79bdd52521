"""Where results go: nothing is overwritten unasked, and an interrupted training goes on."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from hf_qst.saved.whole_files import is_empty

from .errors import UsageError

_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")


def checkpoints(folder: str | Path) -> list[Path]:
    """The folders of a Trainer's checkpoints, by step."""
    found = [path for path in Path(folder).glob("checkpoint-*") if _CHECKPOINT.match(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest whole checkpoint: the Trainer writes its state last."""
    for path in reversed(checkpoints(folder)):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return path
    return None


def checkpoint_to_resume(folder: str | None, resume: bool, overwrite: bool) -> Path | None:
    """Check a training's folder; the checkpoint that it goes on from, None for a new training.

    Raises:
        UsageError: the folder is taken, there is nothing to resume, or both options were given.
    """
    if resume and overwrite:
        raise UsageError("resume", "it goes on with what --overwrite would discard; give one of the two")
    if not resume:
        require_free(folder, overwrite)
        return None
    found = last_checkpoint(folder) if folder else None
    if found is None:
        raise UsageError("resume", f"there is no whole checkpoint in {folder!r}; leave it out to start anew")
    return found


def require_free(folder: str | None, overwrite: bool, required: bool = True) -> None:
    """Check that a result may be written to a folder.

    Raises:
        UsageError: there is no name, a file has that name, or the folder is not empty and may not be overwritten. What a
            killed run left unfinished does not count.
    """
    if folder is None:
        if required:
            raise UsageError("output_dir", "it must be given")
        return
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise UsageError("output_dir", f"{folder!r} is a file; give a folder")
    if path.is_dir() and not is_empty(path) and not overwrite:
        raise UsageError("output_dir", f"{folder!r} is not empty; give another folder, or --overwrite")


def discard_checkpoints(folder: str) -> None:
    """Remove the checkpoints of an earlier training, from which nobody should go on by mistake."""
    for path in checkpoints(folder):
        shutil.rmtree(path)
