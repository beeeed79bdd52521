"""Mixed-rank compression beside its peers, at equal numbers of parameters, on a language model and a vision transformer.

    python -m benchmarks.compression                       # all parts, about an hour on two CPU cores
    python -m benchmarks.compression --parts llm vit       # some of them; the others stay in the file as they are
    python -m benchmarks.compression --predict-7b          # time and memory for a 7B model, with the arithmetic
    python -m benchmarks.compression --quick               # the same with tiny sizes, to see that it runs

Parts: `llm` (held-out perplexity by method), `cost` (seconds and memory of making them), `residual` (factors beside 4-bit weights), `vit` (accuracy by method and
seed), `layers` (each layer's error against the optimum), `speed` (factors against dense layers, whole models), `7b`.
Each is written to `compression.json` in the folder of `--output` as it is made, row by row, so that a run that was cut
short goes on where it was; `--fresh` starts again. Prints tables and draws plots beside the file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.common.checks import require_device, require_parts, require_positive
from benchmarks.common.measure import ROOT, ResultFile
from benchmarks.compression import layers as compression_layers
from benchmarks.compression import llama_7b as large
from benchmarks.compression import llm as compression_llm
from benchmarks.compression import speed as compression_speed
from benchmarks.compression import vit as compression_vit
from benchmarks.compression.methods import DEFAULT, LLM_METHODS, METHODS
from benchmarks.compression.plots import plots
from benchmarks.compression.report import report
from examples import compress_vit

PARTS = ("llm", "cost", "residual", "vit", "layers", "speed", "7b")
POSITIVE = ("calibration_blocks", "held_blocks", "seeds", "epochs", "images", "rank", "repeats", "threads")
QUICK = {
    "keep": [0.6],
    "vit_keep": [0.4],
    "methods": ["svd", "svd-llm", "mix", DEFAULT],
    "seeds": 2,
    "epochs": 1,
    "calibration_blocks": 4,
    "held_blocks": 8,
    "images": 64,
    "repeats": 1,
    "rank": 4,
    "widths_7b": [256, 688],
}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compression",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (default: everything)")
    add("--model", default=str(compression_llm.BASE), help="trained language model (default: the project's)")
    add(
        "--methods",
        nargs="+",
        choices=METHODS,
        help="rows of the tables (default: all; the language model's without kd)",
    )
    add("--keep", nargs="+", type=float, default=[0.8, 0.6, 0.4], help="parts of the language model's weights to keep")
    add("--vit-keep", nargs="+", type=float, default=[0.4, 0.2, 0.1], help="the same of the vision transformer's")
    add("--layers-keep", type=float, default=0.4, help="at which the costs and the layers' errors are taken")
    add("--calibration-blocks", type=int, default=64, help="blocks of 512 tokens")
    add("--held-blocks", type=int, default=64, help="held-out blocks of 512 tokens of each kind of text")
    add("--seeds", type=int, default=5, help="vision transformers to train")
    add("--epochs", type=float, default=80, help="of their training")
    add("--images", type=int, default=256, help="their calibration images")
    add("--rank", type=int, default=16, help="mean rank of the residuals")
    add("--repeats", type=int, default=7, help="timed rounds")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add("--widths-7b", nargs="+", type=int, default=[large.HIDDEN, large.INNER],
        help="widths of the layers of the part 7b that are really decomposed")  # fmt: skip
    add("--predict-7b", action="store_true", help="the part 7b alone")
    add("--quick", action="store_true", help="tiny sizes: shows that it runs, not what it is worth")
    add("--fresh", action="store_true", help="forget what is in the file")
    add("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    args = parser.parse_args(argv)
    require_positive(parser, args, POSITIVE)
    require_parts(parser, args, ("keep", "vit_keep"))
    require_device(parser, args)
    if args.predict_7b:
        args.parts = ["7b"]
    if args.quick:
        vars(args).update(QUICK)
    return args


def results_of(args: argparse.Namespace) -> ResultFile:
    return ResultFile(args.output / "compression.json", torch.device(args.device), args.fresh)


class Bench:
    """The parts, each of which takes what there is of its result and a function that writes one."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.device = args, torch.device(args.device)

    def used(self, part: str) -> dict:
        """The arguments that a part's figures depend on."""
        names = {
            "llm": ("model", "calibration_blocks", "held_blocks", "device"),
            "cost": ("model", "calibration_blocks", "layers_keep", "threads", "device"),
            "residual": ("model", "calibration_blocks", "held_blocks", "rank", "device"),
            "vit": ("epochs", "images", "device"),
            "layers": ("model", "calibration_blocks", "held_blocks", "layers_keep", "epochs", "images", "device"),
            "speed": ("model", "keep", "repeats", "threads", "device", "quick"),
            "7b": ("threads", "quick"),
        }
        used = {name: getattr(self.args, name) for name in names[part]}
        if "model" in used and Path(used["model"]) == compression_llm.BASE:
            used["model"] = "examples/base_model"
        return used

    def dense_and_text(self):
        args = self.args
        dense = compression_llm.load_dense(args.model, self.device)
        return dense, compression_llm.load_text(args.model, args.calibration_blocks, args.held_blocks)

    def llm(self, done: dict, save) -> dict:
        methods = self.args.methods or LLM_METHODS
        return compression_llm.compare(*self.dense_and_text(), methods, self.args.keep, done, save)

    def cost(self, done: dict, save) -> dict:
        methods = self.args.methods or LLM_METHODS
        return compression_llm.cost(*self.dense_and_text(), methods, self.args.layers_keep, done, save)

    def residual(self, done: dict, save) -> dict:
        args = self.args
        return compression_llm.residuals(*self.dense_and_text(), args.model, args.rank, done, save)

    def vit(self, done: dict, save) -> dict:
        args = self.args
        methods = args.methods or list(METHODS)
        return compression_vit.compare(
            methods, args.vit_keep, args.seeds, args.epochs, args.images, done, save, self.device
        )

    def layers(self, done: dict, save) -> dict:
        args, keep = self.args, self.args.layers_keep
        if "llm" not in done:
            dense, text = self.dense_and_text()
            held = [{"input_ids": part} for part in text.held["stdlib"].split(compression_llm.BATCH)]
            done["llm"] = compression_layers.both(dense, text.calibration, held, keep)
            save(done)
        if "vit" not in done:
            model, training, test = compression_vit.trained(0, args.epochs, self.device)
            batches, held = (
                compress_vit.calibration(training, args.images),
                compress_vit.calibration(test, len(test[0])),
            )
            done["vit"] = compression_layers.both(model, batches, held, keep)
        return done

    def speed(self, done: dict, save) -> dict:
        args = self.args
        sizes = {"shapes": ((64, 64),), "rows": (1, 16), "parts": (0.4, 1.0)} if args.quick else {}
        if "layers" not in done:
            done["layers"] = compression_speed.layers(repeats=args.repeats, device=self.device, **sizes)
            save(done)
        for name in ("base", "100m"):
            if name not in done:
                done[name] = self._model_speed(name)
                save(done)
        return done

    def _model_speed(self, name: str) -> list[dict]:
        args = self.args
        if name == "base":
            dense = compression_llm.load_dense(args.model, self.device)
        else:
            dense = compression_speed.large_model(self.device, "tiny" if args.quick else "100m")
        made = {"dense": dense}
        for keep in args.keep:
            made[f"{keep:g}"] = compression_speed.with_ranks(dense, compression_speed.uniform_ranks(dense, keep))
        prompt, new = (32, 4) if args.quick else (512, 32)
        return compression_speed.models(made, prompt, new, args.repeats, dense.config.vocab_size, self.device)

    def large(self, done: dict, save) -> dict:
        size = 256 if self.args.quick else large.HIDDEN
        return large.measured(size, self.args.widths_7b, done, save)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    transformers_logging.set_verbosity_error()
    results, bench = results_of(args), Bench(args)
    for part in args.parts:
        used = bench.used(part)
        save = lambda result, part=part, used=used: results.put(part, used, result)
        make = bench.large if part == "7b" else getattr(bench, part)
        done = results.begun(part, used)
        before = json.dumps(done)
        result = make(done, save)
        if json.dumps(result) != before:
            save(result)
    found = results.results()
    print("\n" + report(found, args.parts))
    files = [results.path, *plots(found, args.parts, args.output)]
    print("\nwritten: " + ", ".join(str(file) for file in files), flush=True)


if __name__ == "__main__":
    main()
