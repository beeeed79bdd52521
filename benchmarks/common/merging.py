"""One result of several processes, each of which made some rows of it and wrote them to a file of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import reduce
from pathlib import Path

# What tells one row of a list from another. Where it does not, as with timings, the later file's list counts as a whole.
_IDENTITY = ("seed", "keep", "method", "recovery", "model", "rate")


class DifferentRunsError(ValueError):
    """Files that do not belong together, or one that is not there."""


def merged_files(paths: Sequence[Path], same: Sequence[str] = ("arguments",)) -> dict[str, dict]:
    """The parts of result files with all rows that any of them has; of a row that is there twice, the later counts.

    Args:
        paths: of the files.
        same: what must be equal in all files that have a part.

    Raises:
        DifferentRunsError: naming the file that is not there, or that differs.
    """
    parts: dict[str, dict] = {}
    for path in paths:
        if not path.exists():
            raise DifferentRunsError(f"--merge: there is no {path}")
        for part, entry in json.loads(path.read_text()).items():
            known = parts.get(part, entry)
            for name in same:
                if known.get(name) != entry.get(name):
                    raise DifferentRunsError(
                        f"--merge: {path} has other {name} of the part {part!r} than the files before it: {entry.get(name)}, "
                        f"not {known.get(name)}"
                    )
            parts[part] = united([known, entry])
    return parts


def united(results: Sequence[dict]) -> dict:
    """One result with the rows of several; what two of them have is taken from the later."""
    return reduce(_united, results)


def _united(one, other):
    if isinstance(one, dict) and isinstance(other, dict):
        known = {key: _united(value, other[key]) if key in other else value for key, value in one.items()}
        return known | {key: value for key, value in other.items() if key not in one}
    if isinstance(one, list) and isinstance(other, list) and all(isinstance(row, dict) for row in [*one, *other]):
        rows, others = ({_identity(row): row for row in parts} for parts in (one, other))
        if len(rows) == len(one) and len(others) == len(other):
            return list(_united(rows, others).values())
    return other


def _identity(row: dict) -> tuple:
    return tuple(row.get(name) for name in _IDENTITY)
