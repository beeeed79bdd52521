"""The effect of the kernels on whole models: a side-tuning step, and decoding of a pruned model; a stage of `--all`.

    python -m benchmarks.kernels --device cuda --all --stages "end to end"

`torch` is with the kernels off, `auto` as they run by default, `triton` with all of them forced on. The ways take turns;
times are of the host's clock, waited for, medians with the 20th and 80th percentile; `faster` is the median over the
rounds of torch / this. Models are random, of the shapes named; a decoding step is one forward over a static cache,
launched by the host (`eager`) or replayed as a CUDA graph (`graph`). Rows of the same sources are not measured again,
and a case that fails says why.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.common.measure import ROOT, hashes_of, message, synchronize
from benchmarks.common.tables import MIB, markdown
from benchmarks.common.timing import in_turns, paired_ratio
from benchmarks.kernels.end_to_end_cases import CASES, LLAMAS, Made, Sizes
from benchmarks.kernels.timing import Rows, about, check_device, device_peak, spread
from hf_qst_kernels import break_even, use_backend

KEY = ("case", "model", "detail")
# Seconds before the end in which no case is begun, on a GPU.
NOTICE = 45.0


def measure_case(made: Made, device: torch.device, rounds: int) -> dict:
    """The case's facts, and of each way the seconds a step, the memory, and how much faster than `torch` it was."""
    by_way, calls, results = {}, {}, {}

    def with_backend(way: str) -> Callable:
        def call():
            with use_backend(made.backends[way]):
                return made.calls[way]()

        return call

    for way in made.calls:
        call = with_backend(way)
        try:
            made.before()
            result = call()  # compiles, captures, warms up
            if isinstance(result, torch.Tensor):
                results[way] = result.float().clone()
            synchronize(device)
            made.before()
            by_way[way] = device_peak(call, device)
            calls[way] = call
        except Exception as error:
            by_way[way] = {"failed": message(error)}
            check_device(device, error)
    times = in_turns(calls, rounds, device, lambda call: made.before())
    for way in calls:
        seconds = [t / made.per_call for t in times[way]]
        middle, fifths = spread(seconds)
        by_way[way] |= {"seconds": middle, "seconds_p20_p80": fifths}
        # "dense" is what was pruned and computes something else
        for other, name in (("torch", "faster"), ("dense", "faster_than_dense")):
            if other in calls and way != other:
                # logits of the same weights, in parts of the largest
                if way in results and other in results and "dense" not in (way, other):
                    distance = (results[way] - results[other]).abs().max() / results[other].abs().max()
                    by_way[way].setdefault("difference", distance.item())
                by_way[way][name] = paired_ratio(times, other, way)
    return {**(made.facts or {}), "ways": by_way}


def fingerprint() -> dict[str, str]:
    """Hashes of the sources, and the decisions of the tables, that determine what runs here."""
    patterns = ("kernels/hf_qst_kernels/*.py", "hf_qst/**/*.py", "benchmarks/kernels/end_to_end*.py")
    sources = hashes_of([path for pattern in patterns for path in ROOT.glob(pattern)], ROOT)
    tables = [*break_even.SHIPPED.glob("*.json"), *break_even.user_folder().glob("*.json")]
    # not when or with which versions a table was written
    return sources | {
        str(path): json.dumps(json.loads(path.read_text()).get("decisions"), sort_keys=True) for path in sorted(tables)
    }


def measure_all(
    device: torch.device, models: list[str], output: Path, sizes: Sizes, until: float = float("inf")
) -> dict:
    """
    Measure and write `output` after each case; rows that it holds of the same sources and tables stay.

    Args:
        until: when to stop, in seconds since the epoch.

    Returns:
        The report, and `left`: the cases that there was no time for.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    report = {**about(device), "dtype": str(dtype), "sources": fingerprint(), "rows": []}
    # a case builds its models first, which takes longer than a row
    held = Rows.resumed(report, output, until - (NOTICE if device.type == "cuda" else 0))
    left = []
    for case, make_cases in CASES.items():
        for model in models:
            for detail, make in make_cases(LLAMAS[model], device, dtype, sizes):
                row = dict(zip(KEY, (case, model, detail), strict=True))
                if held.find(row):
                    continue
                if held.late:
                    left.append(", ".join(row.values()))
                    continue
                held.measure(row, {}, lambda make=make: measure_case(make(), device, sizes.rounds), device)
                print(table(report["rows"][-1:]), flush=True)
                held.write()
                gc.collect()  # one model's memory must not stand in another's way
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    held.write()
    return {**report, "left": left}


def table(rows: list[dict]) -> str:
    """In Markdown."""
    lines = []
    for row in rows:
        start = [str(row[name]) for name in KEY]
        if "failed" in row:
            lines.append([*start, "", row["failed"]])
            continue
        for way, one in row["ways"].items():
            if "failed" in one:
                lines.append([*start, way, one["failed"]])
                continue
            line = [*start, way, f"{1e3 * one['seconds']:.2f}"]
            line.append("{:.2f}-{:.2f}".format(*(1e3 * seconds for seconds in one["seconds_p20_p80"])))
            line += [f"{one[name]:.2f}" if name in one else "" for name in ("faster", "faster_than_dense")]
            if one["peak_bytes"] is not None:
                line += [f"{one['peak_bytes'] / 2**30:.2f}", f"{one['above_bytes'] / MIB:.0f}"]
            lines.append(line)
    columns = ["case", "model", "what", "way", "ms a step", "p20-p80", "torch / this", "dense / this"]
    return markdown([*columns, "peak GiB", "above MiB"], lines, text=4)
