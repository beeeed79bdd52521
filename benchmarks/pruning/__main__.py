"""Pruning by learned widths next to its peers, at equal numbers of parameters, on the project's base model.

    python -m benchmarks.pruning                           # all parts, about an hour on one CPU core
    python -m benchmarks.pruning --parts quality --keep 0.5 --methods disp flap
    python -m benchmarks.pruning --model smollm2 --parts quality --keep 0.8 --steps 40 --recovery-steps 10
    python -m benchmarks.pruning --quick                   # the same with tiny sizes, to see that it runs

Parts: `quality` (held-out perplexity by method and part kept, before and after the same short LoRA training), `speed`
(prefill and decoding of the dense and the pruned model, at the widths that `quality` learned at the smallest part kept),
`training` (seconds and memory of a step), `draws` (what the noise of drawn channels costs at the start of DISP's learning,
at the first part kept). Each is written to `pruning.json` in the folder of `--output`, row by row; a
run that was cut short goes on where it was, `--fresh` starts again. Prints tables and draws plots.

With `--model smollm2` all methods read Python and the prose of the Debian handbook in equal parts, are evaluated on files
of both that were held out, and the file is `pruning_smollm2.json`. The folder that the model was unpacked to has the same
name there.

Several processes share the work with an `--output` each. `--merge FOLDER...` joins the rows of their files. `--rows FILE`
keeps the text, so that a machine with another standard library reads the same.
"""

from __future__ import annotations

import argparse
import re
import time
from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm

from benchmarks.common.command_line import add_part_options, parser_of, require_device, require_parts, require_positive
from benchmarks.common.llama import dense_llama
from benchmarks.common.measure import write_json
from benchmarks.common.merging import DifferentRunsError, merged_files, united
from benchmarks.common.parts import Part, ResultFile, run_parts
from benchmarks.compression.llm import BASE_NAME, evaluated, load_dense
from benchmarks.compression.methods import parameters
from benchmarks.pruning import cost
from benchmarks.pruning.draws import draws
from benchmarks.pruning.methods import DEFAULT, METHODS, ROUNDED, Bench, Schedule, made, recovered
from benchmarks.pruning.report import TABLES, plots, report
from benchmarks.pruning.text import TEXTS, OtherTextError, kept
from benchmarks.side_tuning.bases import SHAPES
from examples.demo import BASE
from examples.prose import NoTextError
from examples.real_model import HELP, PACKAGED, NoModelError, model_path

PARTS = tuple(TABLES)
POSITIVE = ("seeds", "steps", "batch", "length", "recovery_steps", "training_blocks", "calibration_blocks",
            "held_blocks", "repeats", "threads")  # fmt: skip
QUICK = {
    "keep": [0.6],
    "methods": ["random", "flap", "slicegpt", "shortgpt", "disp"],
    "seeds": 2,
    "steps": 4,
    "recovery_steps": 2,
    "length": 64,
    "training_blocks": 64,
    "calibration_blocks": 2,
    "held_blocks": 2,
    "validation_blocks": 2,
    "repeats": 1,
}
USED = {
    "quality": ("model", "batch", "length", "recovery_steps", "recovery_rate", "training_blocks", "calibration_blocks",
                "held_blocks", "device"),
    "speed": ("model", "repeats", "threads", "device", "quick"),
    "training": ("model", "length", "repeats", "threads", "device"),
    "draws": ("model", "text", "length", "calibration_blocks", "device"),
}  # fmt: skip

# Arguments that files of before do not have, with the values of then.
LATER = {"quality": {"text": "python", "validation_blocks": 0}, "speed": {}, "training": {}, "draws": {}}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of("benchmarks.pruning", __doc__)
    add = parser.add_argument
    add("--model", default=str(BASE), help=f"trained Llama: {HELP}")
    add("--text", choices=TEXTS, help="read by all methods (default: python, for a packaged model python-and-prose)")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="rows of the tables")
    add("--keep", nargs="+", type=float, default=[0.5, 0.6, 0.7, 0.8], help="parts of the blocks' matrices to keep")
    add("--ablation-keep", nargs="+", type=float, default=[0.5, 0.7], help="at which DISP's variants are learned")
    add("--seeds", type=int, default=3, help="seeds at the smallest part kept, of the methods that draw")
    add("--recovered-keep", nargs="*", type=float, help="at which the models are recovered (default: all); rows that "
        "lack it are made again")  # fmt: skip
    add("--steps", type=int, default=300, help="of DISP's learning")
    add("--batch", type=int, default=2, help="rows in a batch")
    add("--length", type=int, default=256, help="tokens in a row")
    add("--recovery-steps", type=int, default=60, help="of the LoRA training after pruning")
    add("--recovery-rate", type=float, default=1e-3, help="its learning rate")
    add("--training-blocks", type=int, default=20_000, help="rows to train on")
    add("--calibration-blocks", type=int, default=32, help="blocks for methods that do not train, of 512 tokens; in "
        "python-and-prose of --length tokens")  # fmt: skip
    add("--held-blocks", type=int, default=16, help="held-out blocks of each kind of text, as long")
    add("--rounded", action=argparse.BooleanOptionalAction, default=True, help="also DISP at widths in 64s")
    add("--validation-blocks", type=int, default=0, help="rows that DISP's Trainer evaluates on while it learns")
    add("--rows", type=Path, help="file of the text's rows: read if it is there, else written")
    add("--merge", type=Path, nargs="+", metavar="FOLDER", help="measure nothing, join the quality of other --output's")
    add_part_options(parser, PARTS)
    args = parser.parse_args(argv)
    require_positive(parser, args, POSITIVE)
    args.recovered_keep = [*args.keep, *args.ablation_keep] if args.recovered_keep is None else args.recovered_keep
    require_parts(parser, args, ("keep", "ablation_keep", "recovered_keep"))
    require_device(parser, args)
    args.text = args.text or ("python-and-prose" if model_name(args.model) in PACKAGED else "python")
    try:
        args.folder = model_path(args.model)
    except NoModelError as error:
        parser.error(str(error))
    if args.quick:
        vars(args).update(QUICK)
    return args


def model_name(model: str) -> str:
    """The model as a result file names it, wherever its folder lies."""
    if Path(model) == BASE:
        return BASE_NAME
    unpacked = re.fullmatch(rf"({'|'.join(PACKAGED)})-[0-9a-f]{{12}}", Path(model).name)
    return unpacked[1] if unpacked else model


def results_of(args: argparse.Namespace) -> ResultFile:
    return ResultFile(args.output / file_name(args), torch.device(args.device), args.fresh)


def file_name(args: argparse.Namespace) -> str:
    name = f"pruning_{model_name(args.model)}" if model_name(args.model) in PACKAGED else "pruning"
    return f"{name}_other_rows.json" if args.text.endswith("-other") else f"{name}.json"


def used(args: argparse.Namespace, part: str) -> dict:
    """The arguments that a part's figures depend on."""
    values = {name: getattr(args, name) for name in USED[part]}
    values |= {name: getattr(args, name) for name, usual in LATER[part].items() if getattr(args, name) != usual}
    if part in ("quality", "draws") and args.text != "python":
        values["calibration"] = (
            "evenly spaced"  # the first rows once, which no file that is continued may mix with these
        )
    return values | {"model": model_name(args.model)}


def bench_of(args: argparse.Namespace) -> Bench:
    """The dense model and everything the methods share."""
    # cuDNN would round what DISP's GRU reads to TF32; other products are in float32 anyway.
    torch.backends.cudnn.allow_tf32 = False
    sizes = (args.length, args.training_blocks + args.validation_blocks, args.calibration_blocks, args.held_blocks)
    try:
        text, rows = kept(args.rows, args.text, model_name(args.model), sizes, partial(TEXTS[args.text], args.folder))
    except (NoTextError, OtherTextError) as error:
        raise SystemExit(str(error)) from None
    # The last rows are trained on by nobody.
    split = len(rows) - args.validation_blocks
    rows, validation = rows[:split], rows[split:] if args.validation_blocks else None
    return Bench(
        dense=load_dense(args.folder, torch.device(args.device)),
        text=text,
        learning=Schedule(rows, args.steps, args.batch, validation),
        recovery=Schedule(rows, args.recovery_steps, args.batch),
        recovery_rate=args.recovery_rate,
        rounded=args.rounded,
    )


def wanted(args: argparse.Namespace, rows: list[dict]) -> list[tuple[float, str, int]]:
    """(keep, method, seed) of the rows to make, one seed of everything first."""
    done = [row for row in current(args, rows) if "recovered" in row or row["keep"] not in args.recovered_keep]
    have = {key_of(row) for row in done}
    every = [(keep, method, 0) for keep in args.keep for method in args.methods if not METHODS[method].ablation]
    every += [(keep, method, 0) for keep in args.ablation_keep for method in args.methods if METHODS[method].ablation]
    drawn = [method for method in args.methods if METHODS[method].seeds]
    every += [(min(args.keep), method, seed) for seed in range(1, args.seeds) for method in drawn]
    return [one for one in every if one not in have]


def key_of(row: dict) -> tuple[float, str, int]:
    return row["keep"], row["method"], row["seed"]


def current(args: argparse.Namespace, rows: list[dict]) -> list[dict]:
    """The rows that were learned in as many steps as wanted now, or not learned."""
    steps = lambda row: args.steps * (METHODS[row["method"]].times if row["method"] in METHODS else 1)
    return [row for row in rows if row.get("steps", steps(row)) == steps(row)]


def quality(args: argparse.Namespace, result: dict, save) -> dict:
    """Every method at every part kept, before and after the recovery; rows that are there are not made again."""
    todo = wanted(args, result.get("rows", []))
    if not todo:
        return result
    bench = bench_of(args)
    if result:
        result["rows"] = current(args, result["rows"])
    else:
        dense = {"parameters": parameters(bench.dense), **evaluated(bench.dense, bench.text)}
        result = {"dense": dense, "full_widths": cost.layout_of(bench.dense).full_widths, "rows": []}
    for keep, method, seed in tqdm(todo, desc="quality", unit="model"):
        for row, model in made(bench, method, keep, seed):
            row |= evaluated(model, bench.text)
            result["rows"] = [*(one for one in result["rows"] if key_of(one) != key_of(row)), row]
            save(result)
            print(f"{row['method']}, keep {keep:g}, seed {seed}: {row['seconds']:.1f} s", row["perplexity"], flush=True)
            if row["method"] == method and keep in args.recovered_keep:  # not a second export of the same
                start = time.perf_counter()
                row["recovered"] = evaluated(recovered(bench, model, seed), bench.text)
                row["recovery_seconds"] = time.perf_counter() - start
                save(result)
                print("recovered:", row["recovered"]["perplexity"], flush=True)
    return result


def speed(args: argparse.Namespace, learned: list[dict], result: dict, save) -> dict:
    """The base and a random model of 100M parameters at the widths learned at the smallest part kept."""
    rows = [row for row in learned if row["method"] == DEFAULT and row["seed"] == 0]
    if not rows:
        raise SystemExit(
            f"--parts speed needs the widths that --parts quality --methods {DEFAULT} learns: run it first"
        )
    row = min(rows, key=lambda one: one["keep"])
    device = torch.device(args.device)
    prompt, new = (32, 4) if args.quick else (512, 32)
    base = load_dense(args.folder, device)
    for name in (name for name in ("base", "100m") if name not in result):
        dense = (
            base
            if name == "base"
            else dense_llama(SHAPES["tiny" if args.quick else "100m"].config, device, torch.float32)
        )
        source, target = cost.layout_of(base), cost.layout_of(dense)
        widths = {
            "as learned": cost.scaled(row["widths"], source, target, 1),
            f"in {ROUNDED}s": cost.scaled(row["widths"], source, target, ROUNDED),
        }
        result["keep"] = row["keep"]
        result[name] = cost.speed(dense, widths, prompt, new, args.repeats)
        save(result)
    return result


def training(args: argparse.Namespace, result: dict, save) -> dict:
    """A step of 4 rows of the base."""
    if result:
        return result
    dense = load_dense(args.folder, torch.device(args.device))
    return {"batch": 4, "rows": cost.training(dense, 4, args.length, args.repeats)}


def drawn(args: argparse.Namespace, result: dict) -> dict:
    return result or draws(bench_of(args), args.keep[0])


def parts_of(args: argparse.Namespace, results: ResultFile) -> dict[str, Part]:
    """The parts, each of which takes its unfinished result and a function that writes one."""
    learned = lambda: results.results().get("quality", {}).get("rows", [])
    return {
        "quality": lambda done, save: quality(args, done, save),
        "speed": lambda done, save: speed(args, learned(), done, save),
        "training": lambda done, save: training(args, done, save),
        "draws": lambda done, save: drawn(args, done),
    }


def joined(results: ResultFile, paths: list[Path]) -> dict:
    """The part `quality` of these files and of the results so far, if those are of the same machine and arguments."""
    quality = merged_files(paths, ("arguments", "machine"))["quality"]
    before = results.parts.get("quality", {})
    if all(before.get(name) == quality.get(name) for name in ("arguments", "machine")):
        quality = united([before, quality])
    return {"quality": quality}


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    results = results_of(args)
    if args.merge:
        try:
            results.parts |= joined(results, [folder / file_name(args) for folder in args.merge])
        except DifferentRunsError as error:
            raise SystemExit(str(error)) from None
        write_json(results.path, results.parts)
        print(report(results.results(), ["quality"]))
        print(
            "written:", results.path, *plots(results.results(), ["quality"], args.output, results.path.stem), flush=True
        )
        return
    run_parts(args, results, parts_of(args, results), used, report, partial(plots, stem=results.path.stem))


if __name__ == "__main__":
    main()
