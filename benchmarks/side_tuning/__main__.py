"""QST next to QLoRA, checkpointed QLoRA and ShadowPEFT, and next to the least a step can cost.

    python -m benchmarks.side_tuning                             # the demo's base, ~100M parameters, a 128k vocabulary
    python -m benchmarks.side_tuning --shape demo --model NAME   # another trained base
    python -m benchmarks.side_tuning --shape demo --sweep        # the learning rate that suits each method
    python -m benchmarks.side_tuning --device cuda --shape llama-3-8b

All methods run on the same 4-bit base, batch and steps, one step of each in turn. Prints a table and writes it to
`benchmarks/results/side_tuning_<shape>.json`, with plots.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path
from statistics import median

import torch
from tqdm.auto import tqdm

from benchmarks.common.command_line import as_json, parser_of, require_device, require_positive
from benchmarks.common.measure import RESULTS, ROOT, environment, message, peak_rss, settle_rss, write_json
from benchmarks.common.timing import in_turns, paired_ratio
from benchmarks.side_tuning import bases
from benchmarks.side_tuning.losses import CURVES, loss_results, sweep, train_curves
from benchmarks.side_tuning.methods import METHODS, Floor, Run
from benchmarks.side_tuning.report import plots, table, targets

DEFAULT_SHAPES = ("demo", "100m", "100m-128k")
PEAK_STEPS = 2  # the optimiser's state is there from the second on
PACKED = "bitsandbytes' bf16 (AVX512-BF16) where the base is in eval mode, else dequantise and float32"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of("benchmarks.side_tuning", __doc__)
    add = parser.add_argument
    add("--shape", nargs="+", choices=bases.SHAPES, default=list(DEFAULT_SHAPES), help="bases to measure on")
    add("--model", metavar="PATH_OR_NAME", help="trained model in place of the base of --shape demo")
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="rows of the table")
    add("--batch", type=int, help="sequences per step; without it, the shape's")
    add("--seq", type=int, help="tokens per sequence; without it, the shape's")
    add("--repeats", type=int, help="timed rounds; without it 10, or 2 for shapes that are there for their memory")
    add("--steps", type=int, default=150, help="training steps of the loss curves (--shape demo); 0 for none")
    add("--eval-every", type=int, default=15, help="steps between two points of a loss curve")
    add("--held-out-blocks", type=int, default=32, help="sequences the held-out loss is measured on")
    add("--sweep", action="store_true", help="find the learning rates on --shape demo, and do nothing else")
    add("--sweep-steps", type=int, default=60, help="training steps of each run of --sweep")
    add("--packed", action="store_true", help="let bitsandbytes use its inference-only bf16 kernel on CPU where it can")
    add("--no-rss", action="store_true", help="leave out the peak RSS, which takes a process for each method")
    add("--threads", type=int, default=2, help="CPU threads")
    add("--seed", type=int, default=0, help="of weights, batches and order")
    add("--out", type=Path, default=RESULTS, help="folder of the results")
    add("--rss-of", metavar="METHOD", choices=[*METHODS, "floor"], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    counts = ("batch", "seq", "repeats", "threads", "held_out_blocks", "sweep_steps", "eval_every")
    require_positive(parser, args, counts)
    require_device(parser, args)
    for shape in args.shape:
        if bases.SHAPES[shape].device == "cuda" and not args.device.startswith("cuda"):
            parser.error(f"--shape {shape} needs --device cuda")
    return args


class Bench:
    """One shape: its base, batch and, for a trained base, text."""

    def __init__(self, shape: str, args: argparse.Namespace):
        self.shape, self.args = shape, args
        self.device = torch.device(args.device)
        settings = bases.SHAPES[shape]
        self.batch, self.seq = args.batch or settings.batch, args.seq or settings.seq
        self.memory_only = settings.memory_only
        self.repeats = args.repeats or (2 if self.memory_only else 10)
        self.trained = settings.config is None
        self.model = args.model if self.trained else None
        self.base = bases.load_base(shape, self.model, self.device, args.packed, args.seed)
        self.text = bases.demo_text(self.model, self.seq, args.held_out_blocks, args.seed) if self.trained else None
        if self.trained:
            self.ids = self.text.train[: self.batch].to(self.device)
            more = self.text.train[-2 * self.batch :].split(self.batch)
        else:
            vocab = self.base.config.vocab_size
            self.ids = bases.random_tokens(vocab, self.batch, self.seq, args.seed).to(self.device)
            more = [bases.random_tokens(vocab, self.batch, self.seq, args.seed + 1)]
        self.calibration = [{"input_ids": part} for part in more]

    def run(self, name: str, lr: float | None = None) -> Run:
        """A fresh `Run` of a method; runs share the base's weights unless the kernel in use rewrites them."""
        own = self.args.packed and not METHODS[name].runs_base
        return Run(METHODS[name], bases.copy_of(self.base, own), self.device, self.calibration, lr, self.args.seed)


def prepare(bench: Bench) -> tuple[dict[str, Run], dict[str, dict]]:
    """Build each method and measure what needs no clock. A method that fails has its error as its row."""
    runs, rows = {}, {}
    cuda = bench.device.type == "cuda"
    for name in tqdm(bench.args.methods, desc="building and counting bytes", unit="method"):
        rows[name] = row = {"label": METHODS[name].label}
        try:
            if cuda:
                gc.collect()
                before = torch.cuda.memory_allocated(bench.device)
                torch.cuda.reset_peak_memory_stats(bench.device)
            run = bench.run(name)
            if cuda:
                for _ in range(PEAK_STEPS):
                    run.step(bench.ids)
                row["device_bytes"] = torch.cuda.max_memory_allocated(bench.device) - before
            row["saved_with_head"] = run.saved_bytes(bench.ids, head=True)
            row["saved_without_head"] = run.saved_bytes(bench.ids, head=False)
            row["trainable"], row["file_bytes"] = run.count(), run.file_bytes()
            runs[name] = run
        except Exception as error:
            row["error"] = message(error)
            logging.getLogger(__name__).debug("%s failed", name, exc_info=True)
    return runs, rows


def time_steps(bench: Bench, runs: dict[str, Run]) -> dict[str, list[float]]:
    """Seconds of each round of each method, of the floor, and of the bare forward that is most of it.

    One step of each in turn, so that drift of the machine hits all alike. Variants take part in the first half of the
    rounds, and in none of a shape that is there for its memory.
    """
    floor = Floor(bases.copy_of(bench.base), bench.device)
    steps = {"floor": floor.step, "forward": floor.forward, **{name: run.step for name, run in runs.items()}}
    calls = {name: lambda step=step: step(bench.ids) for name, step in steps.items()}
    main = {name: call for name, call in calls.items() if name not in runs or runs[name].method.main}
    half = 0 if bench.memory_only else -(-bench.repeats // 2)
    first = in_turns(calls, half, bench.device) if half else {}
    second = in_turns(main, bench.repeats - half, bench.device)
    return {name: first.get(name, []) + second.get(name, []) for name in (first or main)}


def rss_above_base(bench: Bench, name: str) -> int:
    """Peak resident bytes of a few training steps above those of the loaded base."""
    before = settle_rss()
    worker = Floor(bench.base, bench.device) if name == "floor" else bench.run(name)
    for _ in range(PEAK_STEPS):
        worker.step(bench.ids)
    return peak_rss() - before


def rss_in_new_process(bench: Bench, name: str) -> int:
    args = bench.args
    command = [sys.executable, "-m", "benchmarks.side_tuning", "--rss-of", name, "--shape", bench.shape]
    command += ["--batch", str(bench.batch), "--seq", str(bench.seq), "--threads", str(args.threads)]
    command += ["--seed", str(args.seed), *(["--packed"] if args.packed else [])]
    command += ["--model", bench.model] if bench.model else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])["rss_bytes"]


def measure(bench: Bench) -> dict:
    """Everything about one shape, as it goes into its JSON file."""
    args = bench.args
    runs, rows = prepare(bench)
    times = time_steps(bench, runs)
    rows = {"forward": {"label": "floor: bare forward"}, "floor": {"label": "floor: forward and head"}, **rows}
    for name, spent in times.items():
        rows[name] |= {"step_seconds": median(spent), "fastest_seconds": min(spent), "rounds": len(spent)}
        rows[name]["tokens_per_second"] = bench.batch * bench.seq / median(spent)
        rows[name]["of_floor"] = paired_ratio(times, name, "floor")
    used = vars(args) | {"shape": bench.shape, "batch": bench.batch, "seq": bench.seq}
    used["repeats"] = bench.repeats
    result = {
        **environment(bench.device),
        "arguments": as_json({k: v for k, v in used.items() if k not in ("rss_of", "sweep")}),
        "parameters": _parameters(bench.base),
        "kernel": PACKED if args.packed else "dequantise, then a product in the compute type",
        "rows": rows,
        "times": times,
    }
    if bench.trained and args.steps:
        del runs
        gc.collect()
        names = [n for n in CURVES if n in args.methods and "error" not in rows[n]]
        curves = train_curves(
            {name: bench.run(name) for name in names}, bench.text, bench.batch, args.steps, args.eval_every
        )
        result["losses"] = loss_results(curves, args.steps)
    if bench.device.type == "cpu" and not args.no_rss:
        names = ["floor", *(n for n in args.methods if METHODS[n].main and "error" not in rows[n])]
        for name in tqdm(names, desc="peak RSS", unit="process"):
            rows[name]["rss_bytes"] = rss_in_new_process(bench, name)
    result["targets"] = targets(bench.shape, result)
    return result


def _parameters(base) -> int:
    """Of the base, a 4-bit weight counted by its entries."""
    return sum(
        p.quant_state.shape.numel() if getattr(p, "quant_state", None) is not None else p.numel()
        for p in base.parameters()
    )


def run_sweep(bench: Bench) -> dict:
    names = [name for name in CURVES if name in bench.args.methods]
    found = sweep(bench.run, names, bench.text, bench.batch, bench.args.sweep_steps)
    where = {"model": bench.model or "examples/base_model", "batch": bench.batch, "seq": bench.seq}
    return {**environment(bench.device), **where, **found}


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message=".*Could not find a config file.*")
    if args.rss_of:
        bench = Bench(args.shape[0], args)
        print(json.dumps({"rss_bytes": rss_above_base(bench, args.rss_of)}))
        return
    for shape in args.shape if not args.sweep else ["demo"]:
        try:
            bench = Bench(shape, args)
        except FileNotFoundError as error:
            if args.shape != list(DEFAULT_SHAPES):
                raise SystemExit(str(error)) from None
            print(f"{shape}: left out, {error}")
            continue
        stem = args.out / f"side_tuning_{shape}{'_packed' if args.packed else ''}"
        if args.sweep:
            write_json(stem.with_name(f"{stem.name}_sweep.json"), run_sweep(bench))
            continue
        result = measure(bench)
        write_json(stem.with_suffix(".json"), result)
        files = [stem.with_suffix(".json"), *plots(result, stem)]
        print("\n" + table(result) + "\nwritten: " + ", ".join(str(f) for f in files) + "\n", flush=True)
        del bench
        gc.collect()


if __name__ == "__main__":
    main()
