"""A benchmark in parts: each is written to one file row by row, so that a run that was cut short goes on."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from benchmarks.common.measure import environment, write_json

# Takes the unfinished result and a function that writes each state of it; returns the whole result.
Part = Callable[[dict, Callable[[dict], None]], dict]


class ResultFile:
    """A JSON file of results: parts by name, each with the machine and the arguments it was made with.

    Args:
        path: the file; its parts are kept unless `fresh`.
        device: what new parts are made on.
    """

    def __init__(self, path: Path, device: torch.device, fresh: bool):
        self.path, self.device = path, device
        self.parts: dict[str, dict] = json.loads(path.read_text()) if path.exists() and not fresh else {}

    def begun(self, part: str, used: dict) -> dict:
        """The result of a part so far, if it was made with the same arguments; else nothing."""
        entry = self.parts.get(part, {})
        return entry.get("result", {}) if entry.get("arguments") == used else {}

    def put(self, part: str, used: dict, result: dict) -> None:
        self.parts[part] = {**environment(self.device), "arguments": used, "result": result}
        write_json(self.path, self.parts)

    def results(self) -> dict[str, dict]:
        return {part: entry["result"] for part, entry in self.parts.items()}


def run_parts(
    args: argparse.Namespace,
    results: ResultFile,
    parts: Mapping[str, Part],
    used: Callable[[argparse.Namespace, str], dict],
    report: Callable[[dict, Sequence[str]], str],
    plots: Callable[[dict, Sequence[str], Path], list[Path]],
) -> None:
    """Make the parts of `args.parts`, print their tables, draw their plots.

    Args:
        used: (arguments, part) -> the arguments that the part's figures depend on.
        report: (results, parts) -> the printed text.
        plots: (results, parts, folder) -> the written files.
    """
    torch.set_num_threads(args.threads)
    transformers_logging.set_verbosity_error()
    for part in (name for name in parts if name in args.parts):
        arguments = used(args, part)
        save = lambda result, part=part, arguments=arguments: results.put(part, arguments, result)
        begun = results.begun(part, arguments)
        before = json.dumps(begun)
        result = parts[part](begun, save)
        if json.dumps(result) != before:
            save(result)
    found = results.results()
    print("\n" + report(found, args.parts))
    print("\nwritten: " + ", ".join(map(str, [results.path, *plots(found, args.parts, args.output)])), flush=True)


def text_of(tables: Mapping[str, Sequence[Callable[[dict], str]]], found: dict, parts: Sequence[str]) -> str:
    """The tables of each part that was made, under its name; a table may be empty."""
    texts = {part: [text for table in tables[part] if (text := table(found[part]))] for part in parts if part in found}
    return "\n\n".join("\n\n".join([part, *lines]) for part, lines in texts.items())


def fill(
    rows: list[dict],
    wanted: Sequence[tuple],
    names: Sequence[str],
    make: Callable[..., dict],
    save: Callable[[], None],
    label: str,
) -> None:
    """Add to `rows` the wanted ones that are missing, and save after each.

    Args:
        wanted: the values of `names` in each row, and the arguments of `make`.
        label: of the progress bar.
    """
    have = {tuple(row[name] for name in names) for row in rows}
    for key in tqdm([key for key in wanted if key not in have], desc=label, unit="row"):
        rows.append(dict(zip(names, key, strict=True)) | make(*key))
        save()
