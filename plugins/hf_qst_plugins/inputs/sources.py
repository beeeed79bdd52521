"""Examples from what a user names: a JSON-lines file, a text file, a folder of texts, or a data set."""

from __future__ import annotations

import json
from pathlib import Path

from hf_qst.extras import require

JSON_LINES = (".jsonl", ".json", ".ndjson")


class DataError(ValueError):
    """Data that are not there or cannot be read; the message names the file, and the line where there is one."""


def read_rows(name: str, split: str = "train", subset: str | None = None, text_field: str = "text") -> list[dict]:
    """The examples of a source, each with `text`, `messages`, or `prompt` and `completion`.

    Args:
        name: a file of JSON lines (`.jsonl`), another file, read as one text, a folder whose UTF-8 files are a text each,
            a folder that `datasets` saved, or a name for `datasets.load_dataset`.
        split, subset: part and configuration of a data set.
        text_field: the field that holds the text of an example.

    Raises:
        DataError: nothing is there, a line is no JSON object, or a data set cannot be loaded.
    """
    path = Path(name)
    if path.is_file():
        rows = _json_lines(path) if path.suffix in JSON_LINES else [{"text": _text(path)}]
    elif path.is_dir() and not any((path / file).exists() for file in ("dataset_info.json", "dataset_dict.json")):
        rows = _folder(path)
    else:
        rows = _data_set(name, split, subset)
    if not rows:
        raise DataError(f"{name!r} holds no examples")
    return (
        [{**row, "text": row[text_field]} for row in rows] if text_field != "text" and text_field in rows[0] else rows
    )


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error


def _json_lines(path: Path) -> list[dict]:
    rows = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number} is a {type(row).__name__}, not an object")
        rows.append(row)
    return rows


def _folder(path: Path) -> list[dict]:
    """A text a file, sorted by name; hidden files, empty ones and those that are no UTF-8 text are left out."""
    rows = []
    for file in sorted(path.rglob("*")):
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts):
            try:
                text = file.read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                continue
            if text.strip() and "\0" not in text:
                rows.append({"text": text})
    return rows


def _data_set(name: str, split: str, subset: str | None) -> list[dict]:
    path = Path(name)
    looks_local = name.startswith((".", "/", "~")) or path.suffix[1:].isalpha()  # "name-2.0" is a data set's
    if looks_local and not path.is_dir():
        raise DataError(f"there is no file or folder {name!r}")
    try:
        require("datasets", f"{name!r} is no file or folder, and a data set")
    except ImportError as error:
        raise DataError(str(error)) from error
    import datasets

    try:
        if path.is_dir():
            loaded = datasets.load_from_disk(name)
            rows = loaded if isinstance(loaded, datasets.Dataset) else loaded[split]
        else:
            rows = datasets.load_dataset(name, subset, split=split)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"the data set {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    return list(rows)
