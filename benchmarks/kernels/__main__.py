"""What the ops of `hf_qst_kernels` cost in time and memory, beside plain torch and other libraries in the same run.

    python -m benchmarks.kernels                            # CPU: the tables of docs/kernels.md, on one thread
    python -m benchmarks.kernels --device cuda              # every op at the shapes of real models, with a roofline
    python -m benchmarks.kernels --device cuda --tune       # measures where Triton wins and writes the user's table
    python -m benchmarks.kernels --device cuda --tune --ship  # the same, into the package
    python -m benchmarks.kernels --device cuda --all --ship --seconds 560   # all of it and whole models, in parts
    python -m benchmarks.kernels --compile                  # no GPU needed: registers, spills and shared memory
    python -m benchmarks.kernels --liger-memory             # no GPU needed: peak memory beside Liger's

On CPU each row is one forward and backward. Variants take turns, so that a busy moment hits all of them; `cpu ms` is the
process's CPU time, which on one thread tells more than `ms` where other programs run. `peak` is what a call allocates
above its inputs, `saved` what it keeps between forward and backward. The floor is the GEMMs alone, over the whole input.

On a GPU each row is a forward, of the ops that train a forward and a backward: device time by events, with a flushed L2
cache and the launches queued ahead; the floor is the larger of bytes over the bandwidth of a copy and FLOP over the
speed of a GEMM, both measured in the same run. `--ops`, `--models` and `--rows` choose; what a results file holds of
the same kernels is not measured again. `--all` runs the tests on the device, tunes, measures these rows and whole
models, and runs compute-sanitizer (`--stages` chooses); call it until it says that nothing is left.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.common.checks import require_positive
from benchmarks.common.measure import synchronize, write_json
from benchmarks.kernels.compiled import main as compile_kernels
from benchmarks.kernels.liger import main as compare_with_liger
from benchmarks.kernels.reads import READINGS
from benchmarks.kernels.registry import MODELS, OPS
from benchmarks.kernels.rows import measure_all, plot_roofline, table
from benchmarks.kernels.stages import STAGES, Plan, run_all
from benchmarks.kernels.timing import about, peak_bytes, run_once
from benchmarks.kernels.tune import tune
from hf_qst_kernels import (
    NF4Weight,
    break_even,
    dequantize_taps,
    linear_cross_entropy,
    quantize_taps,
    tap_linear,
)

RESULTS = Path(__file__).parents[1] / "results"

# tokens, dim, vocabulary, share of rows ignored
HEADS = [(1536, 768, 8192, 0.0), (1536, 768, 8192, 0.5), (256, 768, 131072, 0.0)]
# tokens, dim, output width
TAPS = [(1536, 768, 48), (1536, 768, 192)]


def head_variants(shape: tuple, device: torch.device, dtype: torch.dtype) -> tuple[dict[str, Callable], list]:
    """Loss and gradient in `hidden` of a frozen head; the tensors that are there anyway."""
    tokens, dim, vocab, ignored = shape
    hidden = torch.randn(tokens, dim, device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(vocab, dim, device=device) / dim**0.5).to(dtype)
    labels = torch.randint(vocab, (tokens,), device=device)
    labels[: int(tokens * ignored)] = -100

    def plain():
        return F.cross_entropy(F.linear(hidden, weight).float(), labels)

    def floor():
        with torch.no_grad():
            return torch.mm(torch.mm(hidden, weight.t()), weight)

    variants = {"GEMMs alone": floor, "F.linear + F.cross_entropy": plain}
    variants["linear_cross_entropy"] = lambda: linear_cross_entropy(hidden, weight, labels)
    for chunk in (64, tokens):
        variants[f"  chunk_size={chunk}"] = lambda chunk=chunk: linear_cross_entropy(
            hidden, weight, labels, chunk_size=chunk
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


def tap_variants(shape: tuple, device: torch.device, dtype: torch.dtype) -> tuple[dict[str, Callable], list]:
    """A trained projection of a frozen state."""
    tokens, dim, width = shape
    x = torch.randn(tokens, dim, device=device, dtype=dtype)
    weight = torch.randn(width, dim, device=device, dtype=dtype, requires_grad=True)
    center = torch.randn(dim, device=device, dtype=dtype)

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


def quantiser_variants(shape: tuple, device: torch.device, dtype: torch.dtype) -> tuple[dict[str, Callable], list]:
    x = torch.randn(*shape, device=device, dtype=dtype)
    q, scales = quantize_taps(x)
    return {
        "x.clone()": x.clone,
        "quantize_taps": lambda: quantize_taps(x)[0],
        "dequantize_taps": lambda: dequantize_taps(q, scales, dtype),
    }, []


def measure_times(variants: dict[str, Callable], device: torch.device, repeats: int) -> dict[str, dict]:
    wall = {name: [] for name in variants}
    cpu = {name: [] for name in variants}
    for repeat in range(repeats + 1):
        for name, call in variants.items():
            synchronize(device)
            start, cpu_start = time.perf_counter(), time.process_time()
            run_once(call)
            synchronize(device)
            if repeat:  # the first turn warms up
                wall[name].append(1e3 * (time.perf_counter() - start))
                cpu[name].append(1e3 * (time.process_time() - cpu_start))
    return {
        name: {
            "ms": statistics.median(wall[name]),
            "ms_p20_p80": [statistics.quantiles(wall[name], n=5)[i] for i in (0, 3)],
            "cpu_ms": statistics.median(cpu[name]),
        }
        for name in variants
    }


def saved_bytes(call: Callable, fixed: list) -> int:
    """Bytes kept for backward, less those of the tensors that are there anyway."""
    from hf_qst.planning.saved_bytes import (
        SavedForBackward,  # needs transformers and peft, which rows of a GPU do without
    )

    holder = torch.nn.Module()
    for i, tensor in enumerate(fixed):
        holder.register_buffer(f"fixed_{i}", tensor)
    with SavedForBackward(holder) as saved:
        result = call()
        size = saved.live
    del result
    return size


def measure(op: str, shape: tuple, variants: dict[str, Callable], fixed: list, device: torch.device, repeats: int):
    times = measure_times(variants, device, repeats)
    for name, call in variants.items():
        for tensor in fixed:
            tensor.grad = None
        row = {"op": op, "shape": list(shape), "variant": name, **times[name]}
        row["peak_bytes"] = peak_bytes(call)
        row["saved_bytes"] = saved_bytes(call, fixed)
        print(
            f"{op:<14} {shape!s:<24} {name:<27} {row['ms']:>9.2f} {row['cpu_ms']:>9.2f} "
            f"{row['peak_bytes'] / 2**20:>9.2f} {row['saved_bytes'] / 2**20:>9.2f}",
            flush=True,
        )
        yield row


def measure_cpu(args: argparse.Namespace, dtype: torch.dtype) -> None:
    """The rows of the CPU, printed and written."""
    device = torch.device("cpu")
    groups = [("cross entropy", shape, head_variants) for shape in HEADS]
    groups += [("tap", shape, tap_variants) for shape in TAPS]
    groups += [("quantise", TAPS[0][:2], quantiser_variants)]

    print(f"{'op':<14} {'shape':<24} {'variant':<27} {'ms':>9} {'cpu ms':>9} {'peak MiB':>9} {'saved MiB':>9}")
    rows = []
    for op, shape, make in groups:
        variants, fixed = make(shape, device, dtype)
        repeats = max(3, args.repeats // 3) if op == "cross entropy" and shape[2] > 50000 else args.repeats
        rows.extend(measure(op, shape, variants, fixed, device, repeats))
    report = {**about(device), "dtype": str(dtype), "repeats": args.repeats, "rows": rows}
    write_json(args.output or RESULTS / "kernels_cpu.json", report)


def measure_gpu(args: argparse.Namespace, dtype: torch.dtype) -> None:
    """The rows of the GPU, printed, written and plotted."""
    device = torch.device("cuda", torch.cuda.current_device())
    chip = break_even.chip_of(torch.cuda.get_device_name(device))
    output = args.output or RESULTS / f"kernels_{chip}.json"
    report = measure_all(
        chosen([*OPS, *READINGS], args.ops), chosen(MODELS, args.models), device, dtype, output, not args.no_compile,
        args.rows, args.repeats,
    )  # fmt: skip
    plot_roofline(report, output.with_name(f"{output.stem}_roofline.png"))
    print(table(report["rows"]))
    failed = sum("failed" in row for row in report["rows"])
    print(f"{len(report['rows'])} rows, {failed} of them failed; wrote {output} and its roofline")


def plan_of(args: argparse.Namespace, dtype: str) -> Plan:
    return Plan(
        args.device, dtype, args.seconds, str(args.output_dir), args.repeats, args.ship, args.ops, args.models,
        args.rows, args.tiny, not args.no_compile, args.threads, args.stages,
    )  # fmt: skip


def chosen(every: Sequence, names: list[str] | None) -> list:
    """Those with these names; all of them for None."""
    return [one for one in every if names is None or one.name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default=None, choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--repeats", type=int, default=None, help="timed calls of a row; 9 on CPU, 30 on a GPU")
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument(
        "--ops", nargs="+", default=None, choices=[op.name for op in (*OPS, *READINGS)], help="on a GPU"
    )
    parser.add_argument("--models", nargs="+", default=None, choices=[model.name for model in MODELS], help="on a GPU")
    parser.add_argument("--rows", nargs="+", type=int, default=None, help="on a GPU")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes seconds a shape")
    parser.add_argument("--tune", action="store_true", help="choose configurations, on a GPU")
    parser.add_argument("--ship", action="store_true", help="with --tune or --all: write the table into the package")
    parser.add_argument("--compile", action="store_true", help="compile every kernel for GPUs that need not be here")
    parser.add_argument("--liger-memory", action="store_true", help="peak memory beside Liger's, in the interpreter")
    parser.add_argument("--all", action="store_true", help="tests, tuning, rows, whole models and compute-sanitizer")
    parser.add_argument(
        "--seconds", type=float, default=3600.0, help="with --all: stop after these, and go on next time"
    )
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="with --all")
    parser.add_argument("--stages", nargs="+", default=None, choices=list(STAGES), help="with --all: only these")
    parser.add_argument("--tiny", action="store_true", help="with --all: toy shapes")
    args = parser.parse_args()
    require_positive(parser, args, ("seconds", "repeats", "threads"))
    if args.liger_memory:
        compare_with_liger(args.output)
        return
    if args.compile:
        compile_kernels([] if args.output is None else ["--output", str(args.output)])
        return
    if args.ship and not (args.tune or args.all):
        parser.error("--ship says where the table of --tune or --all goes: give one of them")
    if args.all and args.device != "cuda" and not (args.tiny or args.models):
        parser.error("--all measures on a GPU: give --device cuda, or --tiny to try it without one")
    if args.tune and args.device != "cuda":
        parser.error("--tune measures on a GPU: give --device cuda")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device, and torch finds none")

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.device == "cuda" else "float32"))
    args.repeats = args.repeats or (30 if args.device == "cuda" else 9)
    if args.all:
        run_all(plan_of(args, str(dtype).removeprefix("torch.")))
    elif args.tune:
        folder = break_even.SHIPPED if args.ship else break_even.user_folder()
        tune(chosen(OPS, args.ops), chosen(MODELS, args.models), dtype, folder, args.repeats, args.rows)
    elif args.device == "cuda":
        measure_gpu(args, dtype)
    else:
        measure_cpu(args, dtype)


if __name__ == "__main__":
    main()
