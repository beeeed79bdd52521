"""JSON files of the package's own, written whole and with a checksum of what they hold."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from hf_qst.saved.whole_files import write_text

CHECKSUM = "sha256"
"""Name of the entry that holds the checksum of all others."""


def with_checksum(values: Mapping[str, object]) -> dict[str, object]:
    """The values and their checksum."""
    # As they are read back: the keys of objects are strings there.
    return {**values, CHECKSUM: digest(json.loads(json.dumps(values)))}


def without_checksum(values: object, where: str) -> dict[str, object]:
    """The values alone, after they were checked; without a checksum, as earlier versions wrote them, they are not.

    Raises:
        ValueError: naming `where`, if they are not an object or not what was written.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where} is not a JSON object but {type(values).__name__}")
    found = {name: value for name, value in values.items() if name != CHECKSUM}
    if CHECKSUM in values and values[CHECKSUM] != digest(found):
        raise ValueError(f"{where} is not what was written (checksum)")
    return found


def write_json(path: str | os.PathLike, values: Mapping[str, object], indent: int | None = None) -> None:
    """Write `values` with their checksum, completely or not at all."""
    write_text(path, json.dumps(with_checksum(values), indent=indent) + "\n")


def read_json(path: str | os.PathLike) -> dict[str, object]:
    """The values in a file written by `write_json`.

    Raises:
        ValueError: naming the file, if it is not JSON or not what was written.
    """
    where = os.fspath(path)
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    return without_checksum(values, where)


def digest(value: object) -> str:
    """SHA-256 of a value as JSON, whatever the order of its keys; of a set sorted, of another object its text."""
    text = json.dumps(value, sort_keys=True, default=lambda held: sorted(held) if isinstance(held, set) else str(held))
    return hashlib.sha256(text.encode()).hexdigest()
