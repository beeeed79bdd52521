"""What a command hands over after its checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .record import Record


@dataclass
class Job:
    """A command that was checked and can run.

    Args:
        plan: gives lines that say what it will do; for `--dry_run`.
        work: does it; fills the record.
        output_dir: folder of the result, None where there is none.
        checkpoints: whether there are checkpoints in that folder to go on from.
    """

    plan: Callable[[], list[str]]
    work: Callable[[Record], None]
    output_dir: str | None = None
    checkpoints: bool = False
