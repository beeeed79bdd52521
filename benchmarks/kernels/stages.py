"""One command for every row: tests on the device, tuning, rows, whole models, the sanitizer, and what they show.

    python -m benchmarks.kernels --device cuda --all --ship --seconds 540 --output-dir benchmarks/results

Call it as often as something is left, each time for as long as the device is there. Rows that the output folder holds of
the same sources are not measured again, on whichever machine. On a GPU each stage is a process of its own, which is
started anew if a kernel's fault ended it. Without a GPU the stages that need it are recorded as skipped.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from subprocess import TimeoutExpired

import torch

from benchmarks.common.measure import message, python_path, write_json
from benchmarks.common.tables import markdown
from benchmarks.kernels import aims, end_to_end, rows, sanitize, tune
from benchmarks.kernels.end_to_end_cases import TINY as TINY_SIZES
from benchmarks.kernels.end_to_end_cases import Sizes
from benchmarks.kernels.reads import READINGS
from benchmarks.kernels.registry import MODELS, OPS, ModelShape
from benchmarks.kernels.timing import DeviceLostError, about
from hf_qst.saved import write_text
from hf_qst_kernels import break_even

TINY = ModelShape("tiny", 64, 128, 50)
# Measured before the others, and alone with torch.compile, which takes ten minutes a model.
FIRST = ("Llama-3-8B", "Llama-2-7B")
# A stage is started this often in one call if a fault of the device ends it.
STARTS = 12
# Seconds a stage may take beyond its end, for the shape it is at.
GRACE = 20.0
LOST = 3
# Characters of what a failed stage said that are kept.
LOG = 4000


@dataclass(frozen=True)
class Plan:
    """The options of one call, by their names on the command line; `ops`, `models`, `rows`, `stages`: None for all."""

    device: str
    dtype: str
    seconds: float
    output_dir: str
    repeats: int
    ship: bool = False
    ops: list[str] | None = None
    models: list[str] | None = None
    rows: list[int] | None = None
    tiny: bool = False
    no_compile: bool = False
    threads: int = 1
    stages: list[str] | None = None

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device, torch.cuda.current_device()) if self.device == "cuda" else torch.device("cpu")

    @property
    def chip(self) -> str:
        return break_even.chip_of(torch.cuda.get_device_name()) if self.device == "cuda" else "cpu"

    def file(self, what: str) -> Path:
        """The path of a file of results; those of a CPU have other names than the table of the docs."""
        parts = ["kernels", what, self.chip, "all" if self.device == "cpu" else ""]
        return Path(self.output_dir) / f"{'_'.join(filter(None, parts))}.json"

    @property
    def chosen_ops(self) -> list:
        every = [op for op in (*OPS, *READINGS) if self.ops is None or op.name in self.ops]
        return [dataclasses.replace(op, rows=(2,)) for op in every] if self.tiny else every

    @property
    def chosen_models(self) -> list[ModelShape]:
        chosen = [m for m in MODELS if self.models is None or m.name in self.models]
        order = {name: place for place, name in enumerate(FIRST)}
        return [TINY] if self.tiny else sorted(chosen, key=lambda model: order.get(model.name, len(FIRST)))


# Each stage returns how many things are left, and a line about what there is.


def _tests(plan: Plan, until: float) -> tuple[int, str]:
    report = sanitize.run_device_tests(plan.file("tests"), until)
    counts = {name: sum(row.get(name, 0) for row in report["rows"]) for name in ("passed", "failures", "skipped")}
    broken = sum("failed" in row and not row.get("failures") for row in report["rows"])
    text = ", ".join(f"{count} {name}" for name, count in counts.items())
    return len(report["left"]), f"{text}, {broken} functions not through" if broken else text


def _tune(plan: Plan, until: float) -> tuple[int, str]:
    ops = [op for op in plan.chosen_ops if op in OPS]
    dtype = getattr(torch, plan.dtype)
    folder = Path(plan.output_dir) / "measured"
    path, left = tune.tune(ops, plan.chosen_models, dtype, folder, plan.repeats, plan.rows, until, resume=True)
    install(plan)
    table = json.loads(path.read_text())
    entries = [e for decision in table["decisions"].values() for e in decision if e["triton_us"] < tune.NEVER]
    wins = sum(e["triton_us"] < e["library_us"] for e in entries)
    failed = f", none at {len(table['failed'])} more" if table.get("failed") else ""
    return left, f"{len(entries)} shapes in {path.name}, Triton faster at {wins}{failed}"


def install(plan: Plan) -> None:
    """Put the table of the output folder where dispatch reads it."""
    path = Path(plan.output_dir) / "measured" / f"{plan.chip}.json"
    if plan.device == "cuda" and path.exists():
        tune.install(path, break_even.SHIPPED if plan.ship else break_even.user_folder())


def _rows(plan: Plan, until: float, compiled: bool = False) -> tuple[int, str]:
    report = rows.measure_all(
        plan.chosen_ops, plan.chosen_models[: 1 if compiled else None], plan.torch_device, getattr(torch, plan.dtype),
        plan.file(""), compiled, plan.rows, plan.repeats, until
    )  # fmt: skip
    failed = sum("failed" in row for row in report["rows"])
    return report["left"], f"{len(report['rows'])} rows, {failed} of them without a time"


def _compiled_rows(plan: Plan, until: float) -> tuple[int, str]:
    return _rows(plan, until, compiled=True)


def _end_to_end(plan: Plan, until: float) -> tuple[int, str]:
    tiny = plan.tiny or plan.device == "cpu"
    models, sizes = (["tiny"], TINY_SIZES) if tiny else (["llama-8b", "llama-1b"], Sizes())
    report = end_to_end.measure_all(plan.torch_device, models, plan.file("end_to_end"), sizes, until)
    failed = sum("failed" in row for row in report["rows"])
    return len(report["left"]), f"{len(report['rows'])} cases, {failed} failed"


def _sanitizer(plan: Plan, until: float) -> tuple[int, str]:
    report = sanitize.sanitize(plan.file("sanitize"), until, plan.ops)
    if report["sanitizer"] is None:
        return 0, "compute-sanitizer not found"
    parts = []
    for tool in sanitize.TOOLS:
        failed = ["failed" in row for row in report["rows"] if row["tool"] == tool]
        parts.append(f"{tool}: {failed.count(False)} of {len(failed)} ops clean")
    return len(report["left"]), "; ".join(parts)


# name -> what it does, and whether it needs a GPU; torch.compile takes seconds a shape and comes last
STAGES: dict[str, tuple[Callable[[Plan, float], tuple[int, str]], bool]] = {
    "device tests": (_tests, True),
    "tune": (_tune, True),
    "rows": (_rows, False),
    "end to end": (_end_to_end, False),
    "sanitizer": (_sanitizer, True),
    "rows with torch.compile": (_compiled_rows, True),
}


def run_stage(name: str, plan: Plan, until: float) -> dict:
    """Run a stage in this process; returns `left` and `found`, or `failed` with its reason.

    Raises:
        DeviceLostError: the stage can go on in another process.
    """
    try:
        left, found = STAGES[name][0](plan, until)
        return {"left": left, "found": found}
    except DeviceLostError:
        raise
    except Exception as error:
        traceback.print_exc()
        return {"failed": message(error)}


def run_isolated(name: str, plan: Plan, until: float) -> dict:
    """A stage in a process of its own, started again where the device was lost or the process ended."""
    faults = []
    for _ in range(STARTS):
        if time.time() >= until:
            return {"left": "unknown", "found": "no time was left", "faults": faults}
        result = Path(plan.output_dir) / f".kernels_stage_{os.getpid()}.json"
        command = [sys.executable, "-m", "benchmarks.kernels.stages", json.dumps(dataclasses.asdict(plan)), name]
        command += [repr(until), str(result)]
        try:
            limit = until - time.time() + GRACE
            done = sanitize.finished(command, {"PYTHONPATH": python_path()}, limit)
        except TimeoutExpired:
            return {"left": "unknown", "found": "stopped while it was at something long", "faults": faults}
        if result.exists():
            found = json.loads(result.read_text())
            result.unlink()
            if "failed" in found:
                found["log"] = done.stderr[-LOG:]
            return {**found, "faults": faults} if faults else found
        faults.append(f"exit code {done.returncode}: {done.stderr[-LOG:].strip()}")
        print(f"{name}: {faults[-1][-1000:]}", flush=True)
    return {"failed": f"its process ended {STARTS} times", "faults": faults}


def summary(plan: Plan, report: dict) -> str:
    """In Markdown: stages, aims, what never wins, whole models, the sanitizer, and the packages that are not installed."""
    lines = []
    for name, stage in report["stages"].items():
        text = stage.get("failed") or stage.get("skipped") or stage.get("found", "")
        faults = f" ({len(stage['faults'])} faults of the device)" if stage.get("faults") else ""
        lines.append([name, text + faults, str(stage.get("left", ""))])
    parts = {f"## Kernels on {plan.chip}": markdown(["stage", "", "left"], lines, text=2)}
    parts["### Aims"] = aims.table(report["aims"])
    if plan.device == "cuda":
        losers = ", ".join(report["never_wins"]) or "none"
        parts["### Aims"] += f"\n\nTo delete, for their kernels win at no measured shape: {losers}."
    for title, file, table in (
        ("Whole models", "end_to_end", end_to_end.table),
        ("Tests on the device", "tests", sanitize.tests_table),
        ("compute-sanitizer, errors", "sanitize", sanitize.sanitizer_table),
    ):
        if found := _read(plan.file(file)):
            parts[f"### {title}"] = table(found["rows"])
    if report["missing"]:
        parts["Missing here:"] = "\n".join(f"- {name}: {without}" for name, without in report["missing"].items())
    return "\n\n".join(f"{title}\n\n{text}" for title, text in parts.items())


def _read(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.exists() else None


def run_all(plan: Plan) -> dict:
    """
    Every stage, until the seconds are used up; writes `kernels_stages_<chip>.json` and `kernels_summary_<chip>.md`.

    Returns:
        The report: each stage with what it found and left, the aims, and what is to be deleted.
    """
    until = time.time() + plan.seconds
    install(plan)
    stages = {}
    for name, (_, needs_gpu) in STAGES.items():
        started = time.time()
        if needs_gpu and plan.device != "cuda":
            stages[name] = {"skipped": "needs a CUDA device"}
        elif (name == "rows with torch.compile" and plan.no_compile) or name not in (plan.stages or STAGES):
            stages[name] = {"skipped": "left out"}
        elif plan.device == "cuda":
            stages[name] = run_isolated(name, plan, until)
        else:
            stages[name] = run_stage(name, plan, until)
        stages[name]["seconds"] = round(time.time() - started, 1)
        print(f"{name}: {stages[name]}", flush=True)
    report = {**about(plan.torch_device), "stages": stages}
    measured = _read(plan.file("")) or {"rows": []}
    # the aims are for a GPU
    shown = measured["rows"] if plan.device == "cuda" else []
    report |= {"aims": aims.aims(shown, measured.get("missing")), "never_wins": aims.never_wins(shown)}
    if measured["rows"]:
        roofline = plan.file("").with_name(f"{plan.file('').stem}_roofline.png")
        try:
            rows.plot_roofline(measured, roofline)
        except ImportError as error:
            report["plots"] = message(error)
    write_json(plan.file("stages"), report)
    text = summary(plan, report)
    write_text(plan.file("summary").with_suffix(".md"), text + "\n")
    print(text)
    left = {name: stage["left"] for name, stage in stages.items() if stage.get("left")}
    print(f"\nLeft: {left}. The same command goes on." if left else "\nNothing is left.")
    return report


def main() -> None:
    """A stage in this process, for `run_isolated`: plan, name, end and the file of its result."""
    given, name, until, result = sys.argv[1:]
    plan = Plan(**json.loads(given))
    torch.manual_seed(0)
    torch.set_num_threads(plan.threads)
    try:
        write_json(Path(result), run_stage(name, plan, float(until)))
    except DeviceLostError as error:
        print(message(error), file=sys.stderr)
        sys.exit(LOST)


if __name__ == "__main__":
    main()
