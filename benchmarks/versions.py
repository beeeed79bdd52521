"""The declared ranges, oldest and newest, each in an environment of its own that runs a part of the suite.

    python -m benchmarks.versions --pythons python3.10 python3.11 python3.13
    python -m benchmarks.versions oldest --pythons python3.10         # one row; those of the other rows stay

`oldest`: the oldest Python, and the lower bound of every requirement in setup.cfg. `newest`: the newest Python, and what pip
finds in the ranges. `middle`: the same with each Python between them. `next`: without the upper bounds, which says what will
be met. An environment is kept in `--folder` and completed by the next run. torch for CUDA takes 8 GB each; PIP_EXTRA_INDEX_URL
can name an index with builds for the CPU.
"""

from __future__ import annotations

import argparse
import configparser
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import torch

from benchmarks.common.measure import RESULTS, ROOT, environment, python_path, write_json
from benchmarks.common.tables import markdown

NAME = "versions.json"
KINDS = ("oldest", "middle", "newest", "next")
TESTS = (
    "tests/conformance", "tests/hf_qst/saved", "tests/hf_qst/base_model/test_packed_weights.py", "tests/hf_qst/test_requirements.py",
    "tests/plugins/adaptive_temperature/test_processor.py",
)  # fmt: skip
TOOLS = ("pytest>=8", "hypothesis>=6.100", "datasets>=4.0")
SHOWN = ("torch", "transformers", "peft", "accelerate", "safetensors", "bitsandbytes", "numpy")


@dataclass(frozen=True)
class Row:
    """An environment: its name, its interpreter, and what pip is asked for."""

    name: str
    python: str
    requirements: tuple[str, ...]


def declared() -> list[str]:
    """The requirements of an installation with 4-bit weights, as setup.cfg has them."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    parts = settings["options"]["install_requires"], settings["options.extras_require"]["quantized"]
    return [line for part in parts for line in part.split()]


def requirements(kind: str) -> tuple[str, ...]:
    """Those of a row: lower bounds as the only version, or without upper bounds, or as they are declared."""
    if kind == "oldest":
        return (*(re.sub(r">=([\d.]+).*", r"==\1", line) for line in declared()), *TOOLS)
    if kind == "next":
        return (*(re.sub(r",<.*", "", line) for line in declared()), *TOOLS)
    return (*declared(), *TOOLS)


def rows(pythons: dict[tuple[int, int], str]) -> Iterator[Row]:
    """One of each kind, and a `middle` one for each Python between the oldest and the newest."""
    ordered = sorted(pythons)
    yield Row("oldest", pythons[ordered[0]], requirements("oldest"))
    for version in ordered[1:-1]:
        yield Row(f"middle-{version[0]}.{version[1]}", pythons[version], requirements("middle"))
    yield Row("newest", pythons[ordered[-1]], requirements("newest"))
    yield Row("next", pythons[ordered[-1]], requirements("next"))


def version_of(python: str) -> tuple[int, int]:
    said = subprocess.run(
        [python, "-c", "import sys; print(*sys.version_info[:2])"], check=True, capture_output=True, text=True
    )
    major, minor = map(int, said.stdout.split())
    return major, minor


def install(row: Row, folder: Path) -> str | None:
    """Make or complete the environment of a row; what pip said where that failed."""
    if not (folder / "bin" / "python").exists():
        subprocess.run([row.python, "-m", "venv", str(folder)], check=True)
        subprocess.run(
            [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--upgrade", "pip"], check=True
        )
    command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *row.requirements]
    outcome = subprocess.run(command, capture_output=True, text=True)
    return None if outcome.returncode == 0 else outcome.stderr.strip()[-500:]


def installed(folder: Path) -> dict[str, str]:
    code = (
        "import json, platform; from importlib.metadata import version; "
        f"print(json.dumps({{'python': platform.python_version(), **{{name: version(name) for name in {SHOWN!r}}}}}))"
    )
    said = subprocess.run([str(folder / "bin" / "python"), "-c", code], check=True, capture_output=True, text=True)
    return json.loads(said.stdout)


def run_tests(python: Path, report: Path, tests: tuple[str, ...]) -> dict:
    """Counts of the tests with this interpreter, the names of those that failed, and seconds of the process's own time."""
    report.unlink(missing_ok=True)
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
    before, started = os.times(), time.monotonic()
    outcome = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": python_path()}, capture_output=True, text=True
    )
    after, wall = os.times(), time.monotonic() - started
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    if not cases:
        said = (outcome.stdout.strip()[-500:] + outcome.stderr.strip()[-500:]).strip()
        return {"passed": 0, "failed": [f"no test ran: {said}"]}
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(bad) - len(skipped),
        "skipped": len(skipped),
        "failed": [f"{case.get('classname')}::{case.get('name')}" for case in bad],
        "reasons": sorted({_reason(case) for case in bad}),
        "cpu_seconds": round(sum(after[2:4]) - sum(before[2:4]), 1),
        "wall_seconds": round(wall, 1),
    }


def _reason(case: ElementTree.Element) -> str:
    found = case.find("failure")
    found = case.find("error") if found is None else found
    return (found.get("message") or "").splitlines()[0][:200]


def table(results: dict[str, dict]) -> str:
    columns = ["row", "Python", *SHOWN, "passed", "failed", "skipped", "CPU seconds"]
    lines = []
    for name, result in results.items():
        versions = result.get("versions", {})
        outcome = result.get("tests", {})
        counts = outcome.get("passed", 0), len(outcome.get("failed", [])), outcome.get("skipped", 0)
        figures = (*counts, outcome.get("cpu_seconds", "")) if outcome else ("not installable",)
        lines.append([name, versions.get("python", ""), *(versions.get(n, "") for n in SHOWN), *map(str, figures)])
    return markdown(columns, lines, text=2 + len(SHOWN))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.versions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("rows", nargs="*", help=f"which rows: {', '.join(KINDS)}, or one's whole name (default: all)")
    add("--pythons", nargs="+", default=[sys.executable], help="interpreters, of the Pythons to try")
    add("--folder", type=Path, default=ROOT / ".versions", help="of the environments")
    add("--tests", nargs="+", default=TESTS, help="what each runs")
    add("--output", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args(arguments)
    chosen = list(rows({version_of(python): python for python in args.pythons}))
    if args.rows:
        chosen = [row for row in chosen if row.name in args.rows or row.name.partition("-")[0] in args.rows]
    if not chosen:
        parser.error(
            f"rows {args.rows}: there are {[row.name for row in rows({version_of(p): p for p in args.pythons})]}"
        )
    path = args.output / NAME
    results = json.loads(path.read_text())["rows"] if path.exists() else {}
    for row in chosen:
        folder = args.folder / row.name
        said = install(row, folder)
        if said is not None:
            results[row.name] = {"requirements": row.requirements, "not_installable": said}
        else:
            tests = run_tests(folder / "bin" / "python", folder / "report.xml", tuple(args.tests))
            results[row.name] = {"requirements": row.requirements, "versions": installed(folder), "tests": tests}
        write_json(path, {**environment(torch.device("cpu")), "tests": list(args.tests), "rows": results})
        for reason in results[row.name].get("tests", {}).get("reasons", []) or [said] * (said is not None):
            print(f"{row.name}: {reason}")
    print(table(results))
    return int(any(results[row.name].get("tests", {"failed": [1]})["failed"] for row in chosen if row.name != "next"))


if __name__ == "__main__":
    sys.exit(main())
