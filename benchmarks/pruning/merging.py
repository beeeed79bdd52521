"""One file of several processes' rows of the pruning benchmark."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path


class DifferentRunsError(ValueError):
    """Files that do not belong together, or one that is not there."""


def merged(paths: Sequence[Path]) -> dict:
    """The part `quality` of all these files, with the machine and the arguments of the last.

    Of two rows of one method, part kept and seed the later file's stays, unless the other alone was recovered.

    Args:
        paths: result files of runs with the same arguments; the first need not exist, and is not looked at where its
            arguments are others.

    Raises:
        DifferentRunsError: a file is not there, or was made with other arguments or on another machine.
    """
    before, *others = paths
    if missing := [str(path) for path in others if not path.exists()]:
        raise DifferentRunsError(f"--merge: there is no {', '.join(missing)}")
    entries = {path: json.loads(path.read_text()).get("quality", {}) for path in paths if path.exists()}
    last = entries[others[-1]]
    for path in others:
        for name in ("arguments", "machine"):
            if entries[path].get(name) != last.get(name):
                raise DifferentRunsError(f"--merge: {path} has other {name} than {others[-1]}")
    if any(entries.get(before, {}).get(name) != last.get(name) for name in ("arguments", "machine")):
        entries.pop(before, None)
    rows: dict[tuple, dict] = {}
    for entry in entries.values():
        for row in entry["result"]["rows"]:
            key = row["keep"], row["method"], row["seed"]
            if "recovered" in row or "recovered" not in rows.get(key, {}):
                rows[key] = row
    return {"quality": {**last, "result": {**last["result"], "rows": list(rows.values())}}}
