"""Time and memory of the ops of `hf_qst_kernels`, next to plain torch and other libraries in the same run.

    python -m benchmarks.kernels                            # CPU: the tables of docs/kernels.md, on one thread
    python -m benchmarks.kernels --device cuda              # every op at the shapes of real models, with a roofline
    python -m benchmarks.kernels --device cuda --tune       # measures where Triton wins and writes the user's table
    python -m benchmarks.kernels --device cuda --tune --ship  # the same, into the package
    python -m benchmarks.kernels --device cuda --all --ship --seconds 540   # all of it and whole models, in parts
    python -m benchmarks.kernels --compile                  # no GPU needed: registers, spills and shared memory
    python -m benchmarks.kernels --liger-memory             # no GPU needed: peak memory next to Liger's

On CPU each row is one forward and backward. Variants take turns. `cpu ms` is the process's CPU time, which on one thread
tells more than `ms` where other programs run. `peak` is what a call allocates above its inputs, `saved` what it keeps
between forward and backward. The floor is the GEMMs alone, over the whole input.

On a GPU each row is a forward, of the ops that train a forward and a backward: device time by events, with a flushed L2
cache and the launches queued ahead. The floor is the larger of bytes over the bandwidth of a copy and FLOP over the
speed of a GEMM, both measured in the same run. `--ops`, `--models` and `--rows` choose; rows that a results file holds of
the same kernels are not measured again. `--all` runs the tests on the device, tunes, measures these rows and whole
models, and runs compute-sanitizer (`--stages` chooses); call it until it says that nothing is left.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from benchmarks.common.command_line import parser_of, require_device, require_positive
from benchmarks.common.measure import RESULTS
from benchmarks.kernels import cpu
from benchmarks.kernels.compiled import main as compile_kernels
from benchmarks.kernels.liger import main as compare_with_liger
from benchmarks.kernels.reads import READINGS
from benchmarks.kernels.registry import MODELS, OPS
from benchmarks.kernels.rows import measure_all, plot_roofline, table
from benchmarks.kernels.stages import STAGES, Plan, run_all
from benchmarks.kernels.tune import tune
from hf_qst_kernels import break_even


def measure_gpu(plan: Plan, dtype: torch.dtype, output: Path | None) -> None:
    """The rows of the GPU, printed, written and plotted."""
    output = output or plan.file("")
    report = measure_all(
        plan.chosen_ops,
        plan.chosen_models,
        plan.torch_device,
        dtype,
        output,
        not plan.no_compile,
        plan.rows,
        plan.repeats,
    )
    plot_roofline(report, output.with_name(f"{output.stem}_roofline.png"))
    print(table(report["rows"]))
    failed = sum("failed" in row for row in report["rows"])
    print(f"{len(report['rows'])} rows, {failed} of them failed; wrote {output} and its roofline")


def main() -> None:
    parser = parser_of("benchmarks.kernels", __doc__)
    add = parser.add_argument
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--dtype", choices=("float32", "bfloat16", "float16"))
    add("--threads", type=int, default=1, help="of the CPU")
    add("--repeats", type=int, help="timed calls of a row; 9 on CPU, 30 on a GPU")
    add("--output", type=Path, help="file of the results")
    add("--ops", nargs="+", choices=[op.name for op in (*OPS, *READINGS)], help="on a GPU")
    add("--models", nargs="+", choices=[model.name for model in MODELS], help="on a GPU")
    add("--rows", nargs="+", type=int, help="on a GPU")
    add("--no-compile", action="store_true", help="leave torch.compile out: it takes seconds a shape")
    add("--tune", action="store_true", help="choose configurations, on a GPU")
    add("--ship", action="store_true", help="with --tune or --all: write the table into the package")
    add("--compile", action="store_true", help="compile every kernel for GPUs that need not be here")
    add("--liger-memory", action="store_true", help="peak memory next to Liger's, in the interpreter")
    add("--all", action="store_true", help="tests, tuning, rows, whole models and compute-sanitizer")
    add("--seconds", type=float, default=3600.0, help="with --all: stop after these, and go on next time")
    add("--output-dir", type=Path, default=RESULTS, help="with --all")
    add("--stages", nargs="+", choices=list(STAGES), help="with --all: only these")
    add("--tiny", action="store_true", help="with --all: toy shapes")
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
    require_device(parser, args)

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.device == "cuda" else "float32"))
    args.repeats = args.repeats or (30 if args.device == "cuda" else 9)
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Plan)}
    plan = Plan(**{**given, "dtype": str(dtype).removeprefix("torch."), "output_dir": str(args.output_dir)})
    if args.all:
        run_all(plan)
    elif args.tune:
        folder = break_even.SHIPPED if args.ship else break_even.user_folder()
        tune([op for op in plan.chosen_ops if op in OPS], plan.chosen_models, dtype, folder, args.repeats, args.rows)
    elif args.device == "cuda":
        measure_gpu(plan, dtype, args.output)
    else:
        cpu.measure(dtype, args.repeats, args.output or RESULTS / "kernels_cpu.json")


if __name__ == "__main__":
    main()
