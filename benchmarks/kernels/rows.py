"""Every op of the registry at the shapes of real models: one row for each way to compute it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.common.measure import message
from benchmarks.common.plots import pyplot, save_figure
from benchmarks.common.tables import MIB, markdown
from benchmarks.kernels.compiled import sources
from benchmarks.kernels.peers import peers
from benchmarks.kernels.reads import READINGS, Reading
from benchmarks.kernels.registry import OPS, ModelShape, Op, Workload
from benchmarks.kernels.timing import (
    DeviceLostError,
    Rows,
    Timer,
    about,
    ceilings,
    check_device,
    comparable,
    device_peak,
    floor_us,
    register_4bit,
)
from hf_qst_kernels import use_backend

KEY = ("op", "model", "rows", "workload", "dtype", "variant")
# Variant of ours -> backend.
BACKENDS = {"triton": "triton", "auto": "auto", "library": "torch"}


def variants(op: Op | Reading, device: torch.device, compiled: bool) -> dict[str, Callable]:
    """Ours first (`auto` is what runs by default), then the library path (cuBLAS), then the peers."""
    if isinstance(op, Reading):
        return op.ways(device.type)

    ours = BACKENDS if device.type == "cuda" else ("library",)
    return {**dict.fromkeys(ours, op.function), **peers(op, compiled, device.type)}


def step(op: Op | Reading, workload: Workload, function: Callable, backend: str) -> Callable:
    """A call without arguments: a forward, with a backward where the op is there to train, both on this backend."""
    if not op.trains:

        def forward():
            with torch.no_grad(), use_backend(backend):
                return function(**workload.arguments)

        return forward
    leaves = [v for v in workload.arguments.values() if isinstance(v, torch.Tensor) and v.requires_grad]

    def forward_and_backward():
        with use_backend(backend):
            output = function(**workload.arguments)
            return torch.autograd.grad(output, leaves, torch.ones_like(output))[0]

    return forward_and_backward


def difference(ours, theirs) -> float:
    """Largest difference over the largest entry."""
    pair = [(out[0] if isinstance(out, tuple) else out).detach().clone().float() for out in (ours, theirs)]
    return ((pair[0] - pair[1]).abs().max() / pair[1].abs().max().clamp(min=1e-6)).item()


def changed_ops(before: dict[str, str], now: dict[str, str]) -> set[str]:
    """
    Names of the ops whose rows no longer hold: all, unless the files that changed are of single ops.

    Args:
        before, now: file of the kernels' package -> hash.
    """
    files = {op.name: {*op.files} for op in OPS}
    files["tap_linear"] |= files["quantize_taps"]  # whose kernels it runs as well
    files |= {reading.name: files["tap_linear"] for reading in READINGS}
    changed = {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)}
    if changed - set().union(*files.values()):
        return set(files)
    return {name for name, its in files.items() if its & changed}


def is_done(rows: Rows, key: dict) -> bool:
    """Whether there is such a row; one that only lacked a package is measured when that is there."""
    row = rows.find(key)
    if row is not None and row.get("lacking") and find_spec("liger_kernel"):
        rows.report["rows"].remove(row)
        return False
    return row is not None


def measure_workload(op: Op | Reading, workload: Workload, key: dict, rows: Rows, timer: Timer, compiled: bool) -> bool:
    """Rows of all variants that are not there. A variant whose result is off by more than rounding gets no time.

    Returns:
        Whether there was time for all.
    """
    floor = floor_us(workload.moved, workload.flops, rows.report["ceilings"])
    calls = {
        name: step(op, workload, function, BACKENDS.get(name, "auto"))
        for name, function in variants(op, timer.device, compiled).items()
    }
    todo = [name for name in calls if not is_done(rows, {**key, "workload": workload.name, "variant": name})]
    if not todo or rows.late:
        return not todo
    # what is computed in place is computed on a copy each time, else the variants would see different inputs
    residual = workload.arguments.get("residual")
    kept = None if residual is None else residual.clone()
    expected = calls["library"]()
    expected = tuple(t.clone() for t in expected) if isinstance(expected, tuple) else expected.clone()
    for name in todo:
        if rows.late:
            return False
        if kept is not None:
            residual.copy_(kept)
        facts = {"floor_us": floor, "moved_bytes": workload.moved, "flops": workload.flops}
        once = lambda call=calls[name]: timed(call, expected, floor, timer)
        rows.measure({**key, "workload": workload.name, "variant": name}, facts, once, timer.device)
    return True


def timed(call: Callable, expected, floor: float, timer: Timer) -> dict:
    """The numbers of one row."""
    figures = {"difference": difference(call(), expected)}
    if not figures["difference"] <= 0.05:
        figures["failed"] = f"differs from the library path by {figures['difference']:.2g} of its largest entry"
        return figures
    figures |= {"peak_bytes": device_peak(call, timer.device)["above_bytes"], **timer(call)}
    figures["percent_of_floor"] = 100 * floor / figures["us"]
    return figures


def measure_all(
    ops: Sequence[Op | Reading],
    models: Sequence[ModelShape],
    device: torch.device,
    dtype: torch.dtype,
    output: Path,
    compiled: bool = True,
    rows: Sequence[int] | None = None,
    repeats: int = 30,
    until: float = float("inf"),
) -> dict:
    """
    Measure and write `output` every few seconds and at the end; rows that it holds of kernels that did not change stay.

    So do rows of ops that are not among `ops`. Where their kernels changed, `earlier` in the report names the commit at
    which they were measured.

    Args:
        compiled: measure `torch.compile` as well.
        rows: only these numbers of rows; `None`: those of each op.
        until: when to stop, in seconds since the epoch.

    Returns:
        The report, and `left`: the number of shapes that there was no time for.
    """
    register_4bit()
    timer = Timer(device, repeats)
    report = {**about(device), "dtype": str(dtype), "repeats": repeats, "sources": sources("*.py"), "rows": []}
    if output.exists():
        before = json.loads(output.read_text())
        if comparable(before, report, ("dtype",)):
            report |= {name: before[name] for name in ("ceilings",) if name in before}
            earlier = before.get("earlier", {})
            stale = changed_ops(before.get("sources", {}), report["sources"]) | {*earlier}
            kept = {op.name for op in (*OPS, *READINGS)} - (stale & {op.name for op in ops})
            report["rows"] = [row for row in before["rows"] if row["op"] in kept]
            left_out = {row["op"] for row in report["rows"]} & stale
            report["earlier"] = {op: earlier.get(op, before.get("commit", "unknown")) for op in sorted(left_out)}
    if "ceilings" not in report:
        report["ceilings"] = ceilings(device, dtype)
    # model after model: where the time ends, those that come first have all of their ops
    todo = [(op, m, n) for m, op in itertools.product(models, ops) for n in op.rows if rows is None or n in rows]
    held, left = Rows(report, output, until), 0
    for op, model, count in tqdm(todo, desc="measuring", unit="shape"):
        if held.late:
            left += 1
            continue
        key = {"op": op.name, "model": model.name, "rows": count, "dtype": str(dtype)}
        if is_done(held, {**key, "workload": "inputs"}):
            continue
        torch.manual_seed(0)
        try:
            through = True
            for workload in op.workloads(model, count, dtype, device.type):
                through &= measure_workload(op, workload, key, held, timer, compiled)
                held.write(after=2.0)  # it takes as long as a row once there are many
            left += not through
        except DeviceLostError:
            held.write()
            raise
        except Exception as error:  # its inputs, or its library path
            held.add({**key, "workload": "inputs", "variant": "library", "failed": message(error)})
            held.write()
            check_device(device, error)
    held.write()
    return {**report, "left": left}


def table(rows: Sequence[dict]) -> str:
    """All rows in Markdown; `of library` is the time over that of the library path."""
    shape = lambda row: tuple(row[name] for name in KEY[:-1])
    library = {shape(row): row["us"] for row in rows if row["variant"] == "library" and "us" in row}
    lines = []
    for row in rows:
        line = [row["op"], row["model"], str(row["rows"]), row["workload"], row["variant"]]
        lines.append(line)
        if "failed" in row:
            line.append(row["failed"])
            continue
        base, peak = library.get(shape(row)), row["peak_bytes"]
        line += [f"{row['us']:.1f}", "{:.1f}-{:.1f}".format(*row["us_p20_p80"])]
        line += ["" if base is None else f"{row['us'] / base:.2f}", f"{row['percent_of_floor']:.0f}%"]
        line += [f"{row['host_us']:.0f}", "" if peak is None else f"{peak / MIB:.1f}"]
    columns = [
        "op",
        "model",
        "rows",
        "workload",
        "variant",
        "us",
        "p20-p80",
        "of library",
        "of floor",
        "host us",
        "peak MiB",
    ]
    return markdown(columns, lines, text=5)


def plot_roofline(report: dict, path: Path) -> None:
    """Achieved FLOP/s over FLOP per byte of what multiplies; share of the bandwidth of what does not."""
    limits, rows = report["ceilings"], [row for row in report["rows"] if "us" in row]
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(12, 4.5))
    intensity = [2.0**i for i in range(-2, 14)]
    roof = [min(limits["flops_per_s"], i * limits["bytes_per_s"]) / 1e12 for i in intensity]
    left.loglog(intensity, roof, color="black", linewidth=1)
    ours = {name for name in ("triton", "library") if any(row["variant"] == name for row in rows)}
    for marker, variant in zip("ox", sorted(ours), strict=False):
        chosen = [row for row in rows if row["variant"] == variant and row["flops"]]
        for color, op in enumerate(dict.fromkeys(row["op"] for row in chosen)):
            points = [row for row in chosen if row["op"] == op]
            left.plot([row["flops"] / row["moved_bytes"] for row in points], [row["flops"] / row["us"] / 1e6 for row in points],
                      marker, color=f"C{color}", markersize=4, label=f"{op}, {variant}")  # fmt: skip
        still = [row for row in rows if row["variant"] == variant and not row["flops"]]
        right.plot([row["moved_bytes"] for row in still], [row["percent_of_floor"] for row in still], marker,
                   markersize=4, label=variant)  # fmt: skip
    left.set(xlabel="FLOP per byte", ylabel="TFLOP/s", title="Products")
    right.set(xscale="log", xlabel="bytes", ylabel="% of the copy's bandwidth", title="Without products")
    left.legend(fontsize=6)
    right.legend(fontsize=8)
    figure.tight_layout()
    save_figure(figure, path)
