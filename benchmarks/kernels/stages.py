"""One command for every row: tests on the device, tuning, rows, whole models, the sanitizer, and what they show.

    python -m benchmarks.kernels --device cuda --all --ship --seconds 560 --output-dir benchmarks/results

Call it as often as there is something left, each time for as long as the device is there: what the files of the output
folder hold of the same sources is not measured again, on whichever machine. On a GPU each stage is a process of its
own, which is started anew where a kernel's fault ended it. Without one the stages that need it are recorded as skipped.
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

from benchmarks.common.measure import write_json, write_whole
from benchmarks.kernels import end_to_end as kernels_end_to_end
from benchmarks.kernels import rows as kernels_rows
from benchmarks.kernels import sanitize as kernels_sanitize
from benchmarks.kernels import tune as kernels_tune
from benchmarks.kernels.aims import aims, never_wins
from benchmarks.kernels.aims import table as aims_table
from benchmarks.kernels.reads import READINGS
from benchmarks.kernels.registry import MODELS, OPS, ModelShape
from benchmarks.kernels.timing import DeviceLostError, about, message
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
    """What one call does.

    Args:
        seconds: of the whole call.
        ops, models, rows: as on the command line; `None` for all.
        ship: where the table goes: into the package, else into the user's folder.
        tiny: toy shapes, as in the tests.
        compiled: measure `torch.compile` as well.
        stages: names of `STAGES`; `None` for all.
    """

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
    compiled: bool = True
    threads: int = 1
    stages: list[str] | None = None

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device, torch.cuda.current_device()) if self.device == "cuda" else torch.device("cpu")

    @property
    def chip(self) -> str:
        return break_even.chip_of(torch.cuda.get_device_name()) if self.device == "cuda" else "cpu"

    def file(self, what: str) -> Path:
        """A file of results; those of a CPU have names of their own, beside the table of the docs."""
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


# --- stages: each returns how many things are left, and a line about what there is -----------------------------------


def _tests(plan: Plan, until: float) -> tuple[int, str]:
    report = kernels_sanitize.run_device_tests(plan.file("tests"), until)
    counts = {name: sum(row.get(name, 0) for row in report["rows"]) for name in ("passed", "failures", "skipped")}
    broken = sum("failed" in row and not row.get("failures") for row in report["rows"])
    text = ", ".join(f"{count} {name}" for name, count in counts.items())
    return len(report["left"]), f"{text}, {broken} functions not through" if broken else text


def _table_folder(plan: Plan) -> Path:
    return break_even.SHIPPED if plan.ship else break_even.user_folder()


def _tune(plan: Plan, until: float) -> tuple[int, str]:
    ops = [op for op in plan.chosen_ops if op in OPS]
    dtype = getattr(torch, plan.dtype)
    folder = Path(plan.output_dir) / "measured"
    path, left = kernels_tune.tune(ops, plan.chosen_models, dtype, folder, plan.repeats, plan.rows, until, resume=True)
    install(plan)
    table = json.loads(path.read_text())
    entries = [e for decision in table["decisions"].values() for e in decision if e["triton_us"] < kernels_tune.NEVER]
    wins = sum(e["triton_us"] < e["library_us"] for e in entries)
    failed = f", none at {len(table['failed'])} more" if table.get("failed") else ""
    return left, f"{len(entries)} shapes in {path.name}, Triton faster at {wins}{failed}"


def install(plan: Plan) -> None:
    """Put the table of the output folder to where dispatch reads it."""
    path = Path(plan.output_dir) / "measured" / f"{plan.chip}.json"
    if plan.device == "cuda" and path.exists():
        kernels_tune.install(path, _table_folder(plan))


def _rows(plan: Plan, until: float, compiled: bool = False) -> tuple[int, str]:
    report = kernels_rows.measure_all(
        plan.chosen_ops, plan.chosen_models[: 1 if compiled else None], plan.torch_device, getattr(torch, plan.dtype),
        plan.file(""), compiled, plan.rows, plan.repeats, until,
    )  # fmt: skip
    return report["left"], _count(report["rows"])


def _count(rows: list[dict]) -> str:
    failed = [row for row in rows if "failed" in row]
    return f"{len(rows)} rows, {len(failed)} of them without a time"


def _compiled_rows(plan: Plan, until: float) -> tuple[int, str]:
    return _rows(plan, until, compiled=True)


def _end_to_end(plan: Plan, until: float) -> tuple[int, str]:
    tiny = plan.tiny or plan.device == "cpu"
    models = ["tiny"] if tiny else ["llama-8b", "llama-1b"]
    sizes = kernels_end_to_end.TINY if tiny else kernels_end_to_end.Sizes()
    report = kernels_end_to_end.measure_all(plan.torch_device, models, plan.file("end_to_end"), sizes, until=until)
    failed = sum("failed" in row for row in report["rows"])
    return len(report["left"]), f"{len(report['rows'])} cases, {failed} failed"


def _sanitizer(plan: Plan, until: float) -> tuple[int, str]:
    report = kernels_sanitize.sanitize(plan.file("sanitize"), until, plan.ops)
    if report["sanitizer"] is None:
        return 0, "compute-sanitizer not found"
    parts = []
    for tool in kernels_sanitize.TOOLS:
        rows = [row for row in report["rows"] if row["tool"] == tool]
        clean = sum("failed" not in row for row in rows)
        parts.append(f"{tool}: {clean} of {len(rows)} ops clean")
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
    """A stage in this process: `left`, `found`, or `failed` with its reason.

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
            done = kernels_sanitize.finished(command, {"PYTHONPATH": kernels_sanitize.python_path()}, limit)
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
    """In Markdown: stages, aims, what never wins, whole models, the sanitizer, and what is missing."""
    parts = [f"## Kernels on {plan.chip}", "", "| stage | | left |", "| --- | --- | ---: |"]
    for name, stage in report["stages"].items():
        text = stage.get("failed") or stage.get("skipped") or stage.get("found", "")
        faults = f" ({len(stage['faults'])} faults of the device)" if stage.get("faults") else ""
        parts.append(f"| {name} | {text}{faults} | {stage.get('left', '')} |")
    parts += ["", "### Aims", "", aims_table(report["aims"])]
    if plan.device == "cuda":
        losers = ", ".join(report["never_wins"]) or "none"
        parts += ["", f"To delete, for their kernels win at no measured shape: {losers}."]
    if models := _read(plan.file("end_to_end")):
        parts += ["", "### Whole models", "", kernels_end_to_end.table(models["rows"])]
    if tests := _read(plan.file("tests")):
        parts += ["", "### Tests on the device", "", kernels_sanitize.tests_table(tests["rows"])]
    if checked := _read(plan.file("sanitize")):
        parts += ["", "### compute-sanitizer, errors", "", kernels_sanitize.sanitizer_table(checked["rows"])]
    if report["missing"]:
        parts += ["", "Missing here:", "", *(f"- {name}: {without}" for name, without in report["missing"].items())]
    return "\n".join(parts)


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
        elif (name == "rows with torch.compile" and not plan.compiled) or name not in (plan.stages or STAGES):
            stages[name] = {"skipped": "left out"}
        elif plan.device == "cuda":
            stages[name] = run_isolated(name, plan, until)
        else:
            stages[name] = run_stage(name, plan, until)
        stages[name]["seconds"] = round(time.time() - started, 1)
        print(f"{name}: {stages[name]}", flush=True)
    report = {**about(plan.torch_device), "stages": stages}
    rows = _read(plan.file("")) or {"rows": []}
    # the aims are for a GPU
    shown = rows["rows"] if plan.device == "cuda" else []
    report |= {"aims": aims(shown, rows.get("missing")), "never_wins": never_wins(shown)}
    if rows["rows"]:
        roofline = plan.file("").with_name(f"{plan.file('').stem}_roofline.png")
        try:
            kernels_rows.plot_roofline(rows, roofline)
        except ImportError as error:
            report["plots"] = message(error)
    write_json(plan.file("stages"), report)
    text = summary(plan, report)
    write_whole(plan.file("summary").with_suffix(".md"), (text + "\n").encode())
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
