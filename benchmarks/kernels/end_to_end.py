"""What the kernels change in whole models: a side-tuning step, and decoding of a pruned model.

    python -m benchmarks.kernels.end_to_end --device cuda            # writes results/kernels_end_to_end_<chip>.json
    python -m benchmarks.kernels.end_to_end --tiny                   # toy sizes, on any device: that it runs

`torch` is with the kernels off, `auto` as they run by default (after `python -m benchmarks.kernels --device cuda
--tune`), `triton` with all of them forced on. The ways take turns; times are of the host's clock, waited for, medians
with the 20th and 80th percentile; `faster` is the median over the rounds of torch / this. Models are random, of the
shapes named; a decoding step is one forward over a static cache, launched by the host (`eager`) or replayed as a CUDA
graph (`graph`).
What the file holds of the same sources is not measured again, and a case that fails says why.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from benchmarks.common.measure import ROOT, synchronize
from benchmarks.kernels import end_to_end_cases as kernels_end_to_end_cases
from benchmarks.kernels.end_to_end_cases import CASES, LLAMAS, TINY, Made, Sizes
from benchmarks.kernels.rows import Rows
from benchmarks.kernels.timing import (
    DeviceLostError,
    about,
    check_device,
    comparable,
    device_peak,
    in_turns,
    message,
    spread,
)
from hf_qst_kernels import break_even, use_backend

RESULTS = Path(__file__).parents[1] / "results"
KEY = ("case", "model", "detail")
# Seconds before the end in which no case is begun, on a GPU.
NOTICE = 45.0


def measure_case(made: Made, device: torch.device, rounds: int) -> dict:
    """Seconds a step of each way, what it needed of memory, and how much faster than `torch` it was."""
    found, calls = {}, {}

    def with_backend(way: str) -> Callable:
        def call():
            with use_backend(made.backends[way]):
                return made.calls[way]()

        return call

    results = {}
    for way in made.calls:
        call = with_backend(way)
        try:
            made.before()
            result = call()  # compiles, captures, warms up
            if isinstance(result, torch.Tensor):
                results[way] = result.float().clone()
            synchronize(device)
            made.before()
            found[way] = device_peak(call, device)
            calls[way] = call
        except Exception as error:
            found[way] = {"failed": message(error)}
            check_device(device, error)
    times = in_turns(calls, rounds, device, made.before)
    for way in calls:
        seconds = [t / made.per_call for t in times[way]]
        middle, fifths = spread(seconds)
        found[way] |= {"seconds": middle, "seconds_p20_p80": fifths}
        # "dense" is what was pruned and computes something else
        for other, name in (("torch", "faster"), ("dense", "faster_than_dense")):
            if other in calls and way != other:
                # logits of the same weights, in parts of the largest
                if way in results and other in results and "dense" not in (way, other):
                    distance = (results[way] - results[other]).abs().max() / results[other].abs().max()
                    found[way].setdefault("difference", distance.item())
                found[way][name] = median(a / b for a, b in zip(times[other], times[way], strict=True))
    return found


def fingerprint() -> str:
    """Of the sources that decide what runs here."""
    files = [*(ROOT / "kernels" / "hf_qst_kernels").glob("*.py"), *(ROOT / "hf_qst").rglob("*.py")]
    files += [Path(__file__), Path(kernels_end_to_end_cases.__file__)]
    tables = [*break_even.SHIPPED.glob("*.json"), *break_even.user_folder().glob("*.json")]
    # of a table, what it decides; not when or with which versions it was written
    decided = [json.dumps(json.loads(path.read_text()).get("decisions"), sort_keys=True) for path in sorted(tables)]
    parts = [path.read_text(encoding="utf-8") for path in sorted(files)] + decided
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def measure_all(
    device: torch.device,
    models: list[str],
    output: Path,
    sizes: Sizes,
    cases: list[str] | None = None,
    until: float = float("inf"),
) -> dict:
    """
    Measure and write `output` after each case; rows that it holds of the same sources and tables stay.

    Args:
        until: when to stop, in seconds since the epoch.

    Returns:
        The report as it is in the file, and `left`: the cases that there was no time for.

    Raises:
        DeviceLostError: this process cannot go on; the case that did it says so, and another process can.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    report = {**about(device), "dtype": str(dtype), "sources": fingerprint(), "rows": []}
    if output.exists():
        before = json.loads(output.read_text())
        if comparable(before, report):
            report["rows"] = before["rows"]
    # a case builds its models first, which takes longer than a row
    held = Rows(report, output, until - (NOTICE if device.type == "cuda" else 0))
    done, left = {tuple(row[name] for name in KEY) for row in report["rows"]}, []
    for case, make_cases in CASES.items():
        if cases is not None and case not in cases:
            continue
        for model in models:
            for detail, make in make_cases(LLAMAS[model], device, dtype, sizes):
                key = (case, model, detail)
                if key in done:
                    continue
                if held.late:
                    left.append(", ".join(key))
                    continue
                row = dict(zip(KEY, key, strict=True))
                if (reason := held.begin(row)) is not None:
                    held.add({**row, "failed": reason})
                    continue
                try:
                    made = make()
                    row |= {**(made.facts or {}), "ways": measure_case(made, device, sizes.rounds)}
                    del made
                    held.add(row)
                except Exception as error:
                    held.add({**row, "failed": message(error)})
                    held.write()
                    if isinstance(error, DeviceLostError):
                        raise
                    check_device(device, error)
                print(describe(report["rows"][-1]), flush=True)
                held.write()
                release(device)
    held.write()
    return {**report, "left": left}


def release(device: torch.device) -> None:
    """Give freed memory back, so that one model's does not stand in another's way."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def describe(row: dict) -> str:
    """One line a way."""
    start = ", ".join(str(row[name]) for name in KEY)
    if "failed" in row:
        return f"{start}: {row['failed']}"
    lines = []
    for way, found in row["ways"].items():
        text = found.get("failed") or f"{1e3 * found['seconds']:.2f} ms"
        faster = f", {found['faster']:.2f}x" if "faster" in found else ""
        lines.append(f"{start}: {way} {text}{faster}")
    return "\n".join(lines)


def table(rows: list[dict]) -> str:
    """In Markdown."""
    lines = ["| case | model | what | way | ms a step | p20-p80 | torch / this | dense / this | peak GiB | above MiB |",
             "| --- | --- | --- | --- | ---: | --- | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for row in rows:
        start = f"| {row['case']} | {row['model']} | {row['detail']}"
        if "failed" in row:
            lines.append(f"{start} | | {row['failed']} | | | | | |")
            continue
        for way, found in row["ways"].items():
            if "failed" in found:
                lines.append(f"{start} | {way} | {found['failed']} | | | | | |")
                continue
            low, high = (1e3 * s for s in found["seconds_p20_p80"])
            ratios = [f"{found[name]:.2f}" if name in found else "" for name in ("faster", "faster_than_dense")]
            peak = " | "
            if found["peak_bytes"] is not None:
                peak = f"{found['peak_bytes'] / 2**30:.2f} | {found['above_bytes'] / 2**20:.0f}"
            lines.append(f"{start} | {way} | {1e3 * found['seconds']:.2f} | {low:.2f}-{high:.2f} | "
                         f"{ratios[0]} | {ratios[1]} | {peak} |")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--models", nargs="+", default=None, choices=LLAMAS)
    parser.add_argument("--cases", nargs="+", default=None, choices=CASES)
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device, and torch finds none")
    if args.device == "cpu" and not args.tiny:
        parser.error("models of these sizes take a GPU: give --device cuda, or --tiny")
    device = torch.device(args.device)
    chip = break_even.chip_of(torch.cuda.get_device_name()) if args.device == "cuda" else "cpu"
    output = args.output or RESULTS / f"kernels_end_to_end_{chip}.json"
    models = args.models or (["tiny"] if args.tiny else ["llama-1b", "llama-8b"])
    report = measure_all(device, models, output, TINY if args.tiny else Sizes(), args.cases)
    print(table(report["rows"]))
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
