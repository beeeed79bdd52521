"""The rows of the CPU: time and memory of single ops next to plain torch, the tables of docs/kernels.md."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.common.measure import write_json
from benchmarks.common.tables import MIB, markdown
from benchmarks.common.timing import in_turns
from benchmarks.kernels.timing import about, peak_bytes, run_once, spread
from hf_qst.planning import SavedForBackward
from hf_qst_kernels import NF4Weight, dequantize_taps, linear_cross_entropy, quantize_taps, tap_linear

CPU = torch.device("cpu")
# tokens, dim, vocabulary, share of rows ignored
HEADS = [(1536, 768, 8192, 0.0), (1536, 768, 8192, 0.5), (256, 768, 131072, 0.0)]
# tokens, dim, output width
TAPS = [(1536, 768, 48), (1536, 768, 192)]


def head_variants(shape: tuple, dtype: torch.dtype) -> tuple[dict[str, Callable], list]:
    """Calls for the loss and the gradient in `hidden` of a frozen head; the tensors that exist anyway."""
    tokens, dim, vocab, ignored = shape
    hidden = torch.randn(tokens, dim, dtype=dtype, requires_grad=True)
    weight = (torch.randn(vocab, dim) / dim**0.5).to(dtype)
    labels = torch.randint(vocab, (tokens,))
    labels[: int(tokens * ignored)] = -100

    def plain():
        return F.cross_entropy(F.linear(hidden, weight).float(), labels)

    def floor():
        with torch.no_grad():
            return torch.mm(torch.mm(hidden, weight.t()), weight)

    variants = {"GEMMs alone": floor, "F.linear + F.cross_entropy": plain}
    variants["linear_cross_entropy"] = lambda: linear_cross_entropy(hidden, weight, labels)
    for rows in (64, tokens):
        variants[f"  chunk_size={rows}"] = lambda rows=rows: linear_cross_entropy(
            hidden, weight, labels, chunk_size=rows
        )
    fixed = [hidden, weight, labels]
    if find_spec("bitsandbytes"):
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
        nested = state.state2.absmax, state.state2.code, state.offset
        four_bit = NF4Weight(packed, state.absmax, vocab, *nested)
        variants["linear_cross_entropy, 4-bit head"] = lambda: linear_cross_entropy(hidden, four_bit, labels)
        fixed += [packed, state.absmax, *nested]
    return variants, fixed


def tap_variants(shape: tuple, dtype: torch.dtype) -> tuple[dict[str, Callable], list]:
    """A trained projection of a frozen state."""
    tokens, dim, width = shape
    x = torch.randn(tokens, dim, dtype=dtype)
    weight = torch.randn(width, dim, dtype=dtype, requires_grad=True)
    center = torch.randn(dim, dtype=dtype)

    def floor():
        with torch.no_grad():
            y = torch.mm(x, weight.t())
            return torch.mm(y.t(), x)

    return {
        "GEMMs alone": floor,
        "F.linear": lambda: F.linear(x, weight).sum(),
        "tap_linear, full": lambda: tap_linear(x, weight, "full").sum(),
        "tap_linear, int8": lambda: tap_linear(x, weight, "int8").sum(),
        "F.linear, centered": lambda: F.linear(x - center, weight).sum(),
        "tap_linear, int8, centered": lambda: tap_linear(x, weight, "int8", center).sum(),
        # as the fixed projection has it: nothing trains
        "F.linear, centered, frozen": lambda: F.linear(x - center, weight.detach()),
        "tap_linear, centered, frozen": lambda: tap_linear(x, weight.detach(), "full", center),
    }, [weight, center]


def quantiser_variants(shape: tuple, dtype: torch.dtype) -> tuple[dict[str, Callable], list]:
    x = torch.randn(*shape, dtype=dtype)
    q, scales = quantize_taps(x)
    return {
        "x.clone()": x.clone,
        "quantize_taps": lambda: quantize_taps(x)[0],
        "dequantize_taps": lambda: dequantize_taps(q, scales, dtype),
    }, []


def measure_times(variants: dict[str, Callable], repeats: int) -> dict[str, dict]:
    """Milliseconds of the clock and of the process's CPU time, of a forward and backward of each."""
    calls = {name: lambda call=call: run_once(call) for name, call in variants.items()}
    both = lambda: 1e3 * np.array([time.perf_counter(), time.process_time()])
    summary = {}
    for name, times in in_turns(calls, repeats, CPU, clock=both).items():
        wall, cpu = (spread([float(t) for t in clock]) for clock in zip(*times, strict=True))
        summary[name] = {"ms": wall[0], "ms_p20_p80": wall[1], "cpu_ms": cpu[0]}
    return summary


def saved_bytes(call: Callable, fixed: list) -> int:
    """Bytes kept for backward, less those of the tensors that exist anyway."""
    holder = torch.nn.Module()
    for i, tensor in enumerate(fixed):
        holder.register_buffer(f"fixed_{i}", tensor)
    with SavedForBackward(holder) as saved:
        result = call()
        size = saved.live
    del result
    return size


def measure(dtype: torch.dtype, repeats: int, output: Path) -> None:
    """Print and write all rows."""
    groups = [("cross entropy", shape, head_variants) for shape in HEADS]
    groups += [("tap", shape, tap_variants) for shape in TAPS]
    groups += [("quantise", TAPS[0][:2], quantiser_variants)]
    rows = []
    for op, shape, make in groups:
        variants, fixed = make(shape, dtype)
        large = op == "cross entropy" and shape[2] > 50000
        times = measure_times(variants, max(3, repeats // 3) if large else repeats)
        for name, call in variants.items():
            for tensor in fixed:
                tensor.grad = None
            row = {"op": op, "shape": list(shape), "variant": name, **times[name]}
            rows.append({**row, "peak_bytes": peak_bytes(call), "saved_bytes": saved_bytes(call, fixed)})
        print(table(rows[-len(variants) :]) + "\n", flush=True)
    write_json(output, {**about(CPU), "dtype": str(dtype), "repeats": repeats, "rows": rows})


def table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        line = [row["op"], str(row["shape"]), row["variant"], f"{row['ms']:.2f}", f"{row['cpu_ms']:.2f}"]
        lines.append(line + [f"{row[name] / MIB:.2f}" for name in ("peak_bytes", "saved_bytes")])
    return markdown(["op", "shape", "variant", "ms", "cpu ms", "peak MiB", "saved MiB"], lines, text=3)
