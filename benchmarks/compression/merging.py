"""One result of several processes, each of which made some rows of it and wrote them to a file of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

# What tells one row of a list from another. Where it does not, as with timings, the first file's list counts as a whole.
_IDENTITY = ("seed", "keep", "method", "recovery", "model")


def merge(paths: Sequence[Path]) -> dict[str, dict]:
    """The parts of result files with all rows that any of them has; of a row that is there twice, the first counts.

    Raises:
        ValueError: two files have a part of other arguments; the message names it.
    """
    parts: dict[str, dict] = {}
    for path in paths:
        for part, entry in json.loads(path.read_text()).items():
            known = parts.setdefault(part, entry)
            if known["arguments"] != entry["arguments"]:
                raise ValueError(
                    f"{str(path)!r} has the part {part!r} with the arguments {entry['arguments']}, another file with "
                    f"{known['arguments']}; only results of the same arguments go together"
                )
            known["result"] = _united(known["result"], entry["result"])
    return parts


def _united(one, other):
    if isinstance(one, dict) and isinstance(other, dict):
        known = {key: _united(value, other[key]) if key in other else value for key, value in one.items()}
        return known | {key: value for key, value in other.items() if key not in one}
    if isinstance(one, list) and isinstance(other, list) and all(isinstance(row, dict) for row in [*one, *other]):
        rows, others = ({_identity(row): row for row in parts} for parts in (one, other))
        if len(rows) == len(one) and len(others) == len(other):
            return list(_united(rows, others).values())
    return one


def _identity(row: dict) -> tuple:
    return tuple(row.get(name) for name in _IDENTITY)
