"""Loads damaged copies of a folder and says what became of each: refused, loaded equal, or wrong."""

from __future__ import annotations

import os
import random
import shutil
import signal
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.damage.mutations import damage

SECONDS = 20
"""After which loading counts as hanging."""


@dataclass
class Outcomes:
    """Counts of what became of the damaged folders, and words for each that was neither equal nor refused by name."""

    counts: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in sorted(self.counts.items()))
        return "\n".join([counts, *self.wrong[:40]])


def load_damaged(
    folder: Path,
    work: Path,
    load: Callable[[Path], torch.Tensor],
    cases: int,
    seed: int = 0,
    other: Path | None = None,
    names: tuple[str, ...] = (),
    equal: Callable[[torch.Tensor, torch.Tensor], bool] = torch.equal,
) -> Outcomes:
    """Damage `cases` copies of `folder`, each in one way, and load each.

    Args:
        load: gives what a folder computes, or raises.
        other: a folder of the same kind with other content.
        names: words of which an error that names its cause holds one, beside the names of the folder's files.
    """
    outcomes = Outcomes()
    expected = load(folder)
    files = [file.name for file in folder.iterdir()]
    for case in range(cases):
        draw = random.Random(f"{seed} {case}")
        copy = work / "damaged"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        words = damage(copy, draw, other)
        try:
            with _limited():
                found = load(copy)
        except TimeoutError:
            outcomes.counts["hung"] += 1
            outcomes.wrong.append(f"case {case}, hung: {words}")
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            if any(name in text for name in (*files, *names)):
                outcomes.counts["refused by name"] += 1
            elif not _ours(error):
                outcomes.counts["refused by another library"] += 1
            else:
                outcomes.counts["refused without a name"] += 1
                outcomes.wrong.append(f"case {case}, {words} -> {text[:200]}")
        else:
            if equal(found, expected):
                outcomes.counts["loaded equal"] += 1
            else:
                outcomes.counts["silent"] += 1
                outcomes.wrong.append(f"case {case}, SILENT: {words}")
    return outcomes


def _ours(error: Exception) -> bool:
    """Whether code of the package raised this."""
    file = traceback.extract_tb(error.__traceback__)[-1].filename
    return any(f"{os.sep}{part}{os.sep}" in file for part in ("hf_qst", "hf_qst_plugins"))


@contextmanager
def _limited():
    def stop(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
