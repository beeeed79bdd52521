"""Measures each kernel's configurations against the library and writes the table that dispatch reads."""

from __future__ import annotations

import functools
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.common.measure import message, write_json
from benchmarks.kernels.compiled import sources
from benchmarks.kernels.registry import OPS, ModelShape, Op, Workload
from benchmarks.kernels.timing import Begun, DeviceLostError, Timer, about, check_device, register_4bit
from hf_qst_kernels import break_even, use_backend
from hf_qst_kernels.dispatch import use_configuration

# Asked once: it starts processes, and a table is written after each shape.
_about = functools.cache(about)
# Microseconds of a kernel that could not be run.
NEVER = 1e9


def call_of(op: Op, decision: str, workload: Workload):
    """A call without arguments that runs the one kernel of this decision: a forward, or a backward alone."""
    if decision == op.name:

        def forward():
            with torch.set_grad_enabled(op.trains):
                op.function(**workload.arguments)

        return forward
    first = next(iter(workload.arguments))
    leaf = workload.arguments[first].detach().clone().requires_grad_()
    output = op.function(**{**workload.arguments, first: leaf})
    upstream = torch.randn_like(output)
    return lambda: torch.autograd.grad(output, leaf, upstream, retain_graph=True)


def tune_workload(op: Op, workload: Workload, dtype: torch.dtype, timer: Timer, done=()) -> Iterator[tuple[str, dict]]:
    """Decision and table entry for one shape: the fastest configuration, and the library's time.

    A configuration that cannot be launched here (too much shared memory for this chip) is passed over and said so;
    where none can, the yielded entry is `{"failed": reason}`.

    Args:
        done: decisions that are known for this shape.
    """
    for decision, configurations in op.configurations.items():
        if decision in done:
            continue
        # what would run instead, other kernels of the op's included
        with use_configuration(decision, None):
            call = call_of(op, decision, workload)
            library = timer(call)["us"]
        times, reasons = {}, []
        for i, configuration in enumerate(configurations):
            try:
                with use_backend("triton"), use_configuration(decision, configuration):
                    times[i] = timer(call)["us"]
            except Exception as error:
                reasons.append(f"{decision} {configuration}: {message(error)}")
                tqdm.write(reasons[-1])
                try:
                    check_device(timer.device, error)
                except DeviceLostError as lost:
                    raise DeviceLostError(f"{reasons[-1]}; {lost}") from lost
        if not times:
            yield decision, {"failed": "; ".join(dict.fromkeys(reasons))}
            continue
        best = min(times, key=times.get)
        entry = {"dtype": str(dtype).removeprefix("torch."), "sizes": workload.sizes, "triton_us": times[best]}
        yield decision, {**entry, "library_us": library, "configuration": configurations[best]}


class Table:
    """A chip's table while it is made.

    Beside what dispatch reads, its file holds the kernels' sources and the shapes at which no configuration could run.

    Args:
        path: `<chip>.json`. What it holds of the kernels as they are is kept.
        resume: shapes that are there are not measured again.
        ops: those to be measured now. What the table holds of the others stays even where their kernels changed; its
            `earlier` then names the commit of these measurements.
    """

    def __init__(self, path: Path, chip: str, device: torch.device, resume: bool, ops: Sequence[Op] = OPS):
        self.path, self.chip, self.device, self.resume = path, chip, device, resume
        self.begun = Begun(path)
        self.defaults = {name: choices[0] for op in OPS for name, choices in op.configurations.items()}
        self.decisions, self.failed, self.earlier, self.sources = {}, [], {}, sources("*_triton.py")
        if path.exists():
            break_even.read_table(path, chip)
            before = json.loads(path.read_text())
            files = {name: op.files[1] for op in OPS for name in op.configurations}
            now, earlier = {name for op in ops for name in op.configurations}, before.get("earlier", {})
            changed = {n for n, f in files.items() if before.get("sources", {}).get(f) != self.sources[f]} | {*earlier}
            kept = {n for n in before["decisions"] if n in files and n not in changed & now}
            self.decisions = {n: entries for n, entries in before["decisions"].items() if n in kept}
            self.failed = [entry for entry in before.get("failed", []) if resume and entry["decision"] in kept]
            self.earlier = {n: earlier.get(n, before.get("commit", "unknown")) for n in sorted(kept & changed)}

    def known(self, decision: str, dtype: torch.dtype, sizes: dict) -> bool:
        """Whether this shape needs no measurement."""
        return self.resume and self.has(decision, dtype, sizes)

    def has(self, decision: str, dtype: torch.dtype, sizes: dict) -> bool:
        return any(self._is(entry, dtype, sizes) for entry in self.decisions.get(decision, []))

    def put(self, decision: str, dtype: torch.dtype, sizes: dict, entry: dict) -> None:
        """An entry, or `{"failed": reason}`: then one that never wins, else dispatch would use a neighbouring shape."""
        if "failed" in entry:
            shape = {"dtype": str(dtype).removeprefix("torch."), "sizes": sizes}
            self.failed.append({"decision": decision, **shape, **entry})
            entry = {**shape, "triton_us": NEVER, "library_us": 1.0, "configuration": self.defaults[decision]}
        others = [e for e in self.decisions.get(decision, []) if not self._is(e, dtype, sizes)]
        self.decisions[decision] = [*others, entry]

    def write(self) -> None:
        write_table(
            self.path,
            self.chip,
            self.decisions,
            self.device,
            sources=self.sources,
            earlier=self.earlier,
            failed=self.failed,
        )

    @staticmethod
    def _is(entry: dict, dtype: torch.dtype, sizes: dict) -> bool:
        return (entry["dtype"], entry["sizes"]) == (str(dtype).removeprefix("torch."), sizes)


def tune(
    ops: Sequence[Op],
    models: Sequence[ModelShape],
    dtype: torch.dtype,
    folder: Path,
    repeats: int,
    rows: Sequence[int] | None = None,
    until: float = float("inf"),
    resume: bool = False,
    device: torch.device | None = None,
) -> tuple[Path, int]:
    """
    Tune and write `folder / <chip>.json` after each shape; entries of other shapes in it stay.

    Args:
        until: when to stop, in seconds since the epoch.
        resume: leave out the shapes that the table holds of the same kernels.
        device: `None` for the current GPU. On a CPU it takes Triton's interpreter, for the tests.

    Returns:
        The path of the table, and how many shapes there was no time for.

    Raises:
        DeviceLostError: a configuration broke the CUDA context. It is noted as failed at its shape; another process can
            go on.
    """
    register_4bit()
    device = device or torch.device("cuda", torch.cuda.current_device())
    chip = break_even.chip_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else device.type
    timer = Timer(device, repeats)
    table = Table(folder / f"{chip}.json", chip, device, resume, ops)
    shapes = [
        (op, m, n) for m in models for op in ops if op.configurations for n in op.rows if rows is None or n in rows
    ]
    wins = left = 0
    for op, model, count in tqdm(shapes, desc="tuning", unit="shape"):
        if time.time() >= until:
            left += 1
            continue
        torch.manual_seed(0)
        for workload in op.workloads(model, count, dtype, device.type):
            if workload.sizes is None:
                continue
            done = [d for d in op.configurations if table.known(d, dtype, workload.sizes)]
            if len(done) == len(op.configurations):
                continue
            key = {"op": op.name, "model": model.name, "rows": count, "workload": workload.name, "dtype": str(dtype)}
            reason = table.begun.start(key)
            try:
                if reason is not None:
                    raise RuntimeError(reason)
                for decision, entry in tune_workload(op, workload, dtype, timer, done):
                    table.put(decision, dtype, workload.sizes, entry)
                    wins += entry.get("triton_us", 1) < entry.get("library_us", 0)
            except Exception as error:
                # a library path that cannot run, or a kernel that broke the context: this shape has no entry
                for decision in op.configurations:
                    if not table.has(decision, dtype, workload.sizes):
                        table.put(decision, dtype, workload.sizes, {"failed": message(error)})
                table.write()
                table.begun.end()
                if isinstance(error, DeviceLostError):
                    raise
                check_device(device, error)
            table.begun.end()
        table.write()
    table.write()  # also one without a shape
    total = sum(len(entries) for entries in table.decisions.values())
    print(f"{total} measurements in {table.path}; Triton won {wins} of those made now; {left} shapes left")
    return table.path, left


def install(path: Path, folder: Path) -> Path:
    """Copy a table to where dispatch of later processes looks for it: the package's folder, or the user's."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / path.name).resolve() != path.resolve():
        shutil.copyfile(path, folder / path.name)
    return folder / path.name


def write_table(path: Path, chip: str, decisions: dict, device: torch.device, **more) -> None:
    """Write the table whole, as `break_even.read_table` reads it."""
    write_json(path, {"format": break_even.FORMAT, "chip": chip, **_about(device), **more, "decisions": decisions})
