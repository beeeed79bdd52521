"""Measures each kernel's configurations against the library and writes the table that dispatch reads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.kernels_rows import driver
from benchmarks.kernels_timing import Timer
from benchmarks.measure import environment, write_json
from hf_qst_kernels import break_even, use_backend
from hf_qst_kernels.dispatch import use_configuration
from hf_qst_kernels.registry import ModelShape, Op, Workload


def candidates(op: Op) -> dict[str, list[dict]]:
    """Decision -> configurations; empty for an op whose dispatch asks no table."""
    module = import_module(f"hf_qst_kernels.{op.triton}")
    return {name: c for name, c in getattr(module, "CONFIGURATIONS", {}).items() if name.startswith(op.name)}


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


def tune_workload(op: Op, workload: Workload, dtype: torch.dtype, timer: Timer) -> Iterator[tuple[str, dict]]:
    """Decision and table entry for one shape: the fastest configuration, and the library's time."""
    for decision, configurations in candidates(op).items():
        # what would run instead, other kernels of the op's included
        with use_configuration(decision, None):
            call = call_of(op, decision, workload)
            library = timer(call)["us"]
        times = []
        for configuration in configurations:
            with use_backend("triton"), use_configuration(decision, configuration):
                times.append(timer(call)["us"])
        best = min(range(len(times)), key=times.__getitem__)
        yield (
            decision,
            {
                "dtype": str(dtype).removeprefix("torch."),
                "sizes": workload.sizes,
                "triton_us": times[best],
                "library_us": library,
                "configuration": configurations[best],
            },
        )


def tune(
    ops: Sequence[Op], models: Sequence[ModelShape], dtype: torch.dtype, folder: Path, repeats: int, rows=None
) -> Path:
    """
    Tune on the current GPU and write `folder / <chip>.json` after each op; entries of other shapes in it stay.

    Returns:
        The path of the table.
    """
    if find_spec("bitsandbytes"):
        import bitsandbytes  # noqa: F401  registers the operators that nf4_linear's library path calls

    device = torch.device("cuda", torch.cuda.current_device())
    chip = break_even.chip_of(torch.cuda.get_device_name(device))
    path, timer = folder / f"{chip}.json", Timer(device, repeats)
    decisions = {}
    if path.exists():
        break_even.read_table(path, chip)
        decisions = json.loads(path.read_text())["decisions"]
    shapes = [(op, m, n) for op in ops if candidates(op) for m in models for n in op.rows if rows is None or n in rows]
    wins = 0
    for op, model, count in tqdm(shapes, desc="tuning", unit="shape"):
        torch.manual_seed(0)
        for workload in op.workloads(model, count, dtype, "cuda"):
            for decision, entry in tune_workload(op, workload, dtype, timer):
                same = [
                    e
                    for e in decisions.get(decision, [])
                    if (e["dtype"], e["sizes"]) != (entry["dtype"], entry["sizes"])
                ]
                decisions[decision] = [*same, entry]
                wins += entry["triton_us"] < entry["library_us"]
        write_table(path, chip, decisions, device)
    total = sum(len(entries) for entries in decisions.values())
    print(f"{total} measurements in {path}; Triton won {wins} of those made now")
    return path


def write_table(path: Path, chip: str, decisions: dict, device: torch.device) -> None:
    """Write the table whole, as `break_even.read_table` reads it."""
    about = {**environment(device), **driver(device)}
    write_json(path, {"format": break_even.FORMAT, "chip": chip, **about, "decisions": decisions})
