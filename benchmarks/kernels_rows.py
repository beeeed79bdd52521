"""Every op of the registry at the shapes of real models: one row for each way to compute it."""

from __future__ import annotations

import io
import itertools
import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.kernels_compiled import sources
from benchmarks.kernels_peers import peers
from benchmarks.kernels_timing import Timer, ceilings, floor_us
from benchmarks.measure import environment, write_json, write_whole
from hf_qst_kernels import use_backend
from hf_qst_kernels.registry import ModelShape, Op, Workload

KEY = ("op", "model", "rows", "workload", "dtype", "variant")


def variants(op: Op, device: torch.device, compiled: bool) -> dict[str, Callable]:
    """Ours first (`auto` is what runs by default), then the library path (cuBLAS, bitsandbytes), then the peers."""

    def on(backend):
        def call(**arguments):
            with use_backend(backend):
                return op.function(**arguments)

        return call

    ours = {"triton": on("triton"), "auto": on("auto")} if device.type == "cuda" else {}
    return {**ours, "library": on("torch"), **peers(op, compiled)}


def step(op: Op, workload: Workload, function: Callable) -> Callable:
    """A call without arguments: a forward, with a backward where the op is there to train."""
    if not op.trains:

        def forward():
            with torch.no_grad():
                return function(**workload.arguments)

        return forward
    leaves = [v for v in workload.arguments.values() if isinstance(v, torch.Tensor) and v.requires_grad]

    def forward_and_backward():
        output = function(**workload.arguments)
        return torch.autograd.grad(output, leaves, torch.ones_like(output))[0]

    return forward_and_backward


def difference(ours, theirs) -> float:
    """Largest difference over the largest entry."""
    pair = [(out[0] if isinstance(out, tuple) else out).detach().clone().float() for out in (ours, theirs)]
    return ((pair[0] - pair[1]).abs().max() / pair[1].abs().max().clamp(min=1e-6)).item()


def peak_bytes(call: Callable, device: torch.device) -> int | None:
    """Most bytes a call holds above what was there before it, on a GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def measure_workload(
    op: Op, workload: Workload, key: dict, limits: dict, timer: Timer, compiled: bool
) -> Iterator[dict]:
    """Rows of all variants. A variant whose result is off by more than rounding gets no time."""
    floor = floor_us(workload.moved, workload.flops, limits)
    calls = {name: step(op, workload, f) for name, f in variants(op, timer.device, compiled).items()}
    # what is computed in place is computed on a copy each time, else the variants would see different inputs
    residual = workload.arguments.get("residual")
    kept = None if residual is None else residual.clone()
    expected = calls["library"]()
    expected = tuple(t.clone() for t in expected) if isinstance(expected, tuple) else expected.clone()
    for name, call in calls.items():
        row = {**key, "workload": workload.name, "variant": name, "floor_us": floor}
        row |= {"moved_bytes": workload.moved, "flops": workload.flops}
        if kept is not None:
            residual.copy_(kept)
        try:
            row["difference"] = difference(call(), expected)
            if row["difference"] > 0.05:
                row["failed"] = f"differs from the library path by {row['difference']:.2g} of its largest entry"
            else:
                row |= {"peak_bytes": peak_bytes(call, timer.device), **timer(call)}
                row["percent_of_floor"] = 100 * floor / row["us"]
        except (RuntimeError, torch.OutOfMemoryError) as error:
            row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        yield row


def measure_all(
    ops: Sequence[Op],
    models: Sequence[ModelShape],
    device: torch.device,
    dtype: torch.dtype,
    output: Path,
    compiled: bool = True,
    rows: Sequence[int] | None = None,
    repeats: int = 30,
) -> dict:
    """
    Measure and write `output` after each workload; rows that it holds of the same kernels are not measured again.

    Args:
        rows: only these numbers of rows; `None`: those of each op.

    Returns:
        The report, as it is in the file.
    """
    if find_spec("bitsandbytes"):
        import bitsandbytes  # noqa: F401  registers the operators that nf4_linear's library path calls

    timer = Timer(device, repeats)
    report = {**environment(device), **driver(device), "dtype": str(dtype), "ceilings": ceilings(device, dtype)}
    report |= {"repeats": repeats, "sources": sources("*.py"), "rows": []}
    if output.exists():
        before = json.loads(output.read_text())
        if all(before.get(name) == report[name] for name in ("sources", "machine", "dtype")):
            report["rows"] = before["rows"]
    todo = [(op, m, n) for op in ops for m, n in itertools.product(models, op.rows) if rows is None or n in rows]
    for op, model, count in tqdm(todo, desc="measuring", unit="shape"):
        key = {"op": op.name, "model": model.name, "rows": count, "dtype": str(dtype)}
        done = {row["workload"] for row in report["rows"] if all(row[name] == key[name] for name in key)}
        torch.manual_seed(0)
        for workload in op.workloads(model, count, dtype, device.type):
            if workload.name in done:
                continue
            report["rows"].extend(measure_workload(op, workload, key, report["ceilings"], timer, compiled))
            write_json(output, report)
    return report


def driver(device: torch.device) -> dict:
    """Version of the GPU's driver, of Triton, and of Liger where it is installed."""
    versions = {name: metadata.version(name) for name in ("triton",) if find_spec(name)}
    if find_spec("liger_kernel"):
        versions["liger_kernel"] = metadata.version("liger_kernel")
    if device.type != "cuda":
        return {"kernel_versions": versions}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        shown = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {"kernel_versions": versions, "driver": "unknown"}
    return {"kernel_versions": versions, "driver": shown.splitlines()[0].strip(), "cuda": torch.version.cuda}


def table(rows: Sequence[dict]) -> str:
    """All rows in Markdown; `of library` is the time over that of the library path."""
    library = {tuple(r[k] for k in KEY[:-1]): r["us"] for r in rows if r["variant"] == "library" and "us" in r}
    lines = ["| op | model | rows | workload | variant | us | p20-p80 | of library | of floor | host us | peak MiB |",
             "| --- | --- | ---: | --- | --- | ---: | --- | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for row in rows:
        start = f"| {row['op']} | {row['model']} | {row['rows']} | {row['workload']} | {row['variant']} |"
        if "failed" in row:
            lines.append(f"{start} {row['failed']} | | | | | |")
            continue
        low, high = row["us_p20_p80"]
        base = library.get(tuple(row[k] for k in KEY[:-1]))
        ratio = "" if base is None else f"{row['us'] / base:.2f}"
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}"
        lines.append(
            f"{start} {row['us']:.1f} | {low:.1f}-{high:.1f} | {ratio} | {row['percent_of_floor']:.0f}% | "
            f"{row['host_us']:.0f} | {peak} |"
        )
    return "\n".join(lines)


def plot_roofline(report: dict, path: Path) -> None:
    """Achieved FLOP/s over FLOP per byte of what multiplies; share of the bandwidth of what does not."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    limits, rows = report["ceilings"], [row for row in report["rows"] if "us" in row]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5))
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
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_whole(path, buffer.getvalue())
    plt.close(figure)
