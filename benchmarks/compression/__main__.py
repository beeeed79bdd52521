"""Mixed-rank compression next to its peers, at equal numbers of parameters, on a language model and a vision transformer.

    python -m benchmarks.compression                       # all parts, about an hour on two CPU cores
    python -m benchmarks.compression --parts llm vit       # some of them; the others stay in the file as they are
    python -m benchmarks.compression --parts vit --data fashion-mnist --images 512    # the vision transformer on clothes
    python -m benchmarks.compression --predict-7b          # time and memory for a 7B model, with the arithmetic
    python -m benchmarks.compression --quick               # the same with tiny sizes, to see that it runs

    python -m benchmarks.compression --parts pretrained    # SmolLM2: peers, recovery, 4 bits; `--steps` for some of it
    python -m benchmarks.compression --parts pretrained --merge one/compression_smollm2.json two/compression_smollm2.json

Parts: `llm` (held-out perplexity by method), `cost` (seconds and memory of making them), `residual` (factors next to
4-bit weights), `vit` (accuracy by method and seed), `layers` (each layer's error against the optimum), `speed` (factors
against dense layers, whole models), `7b`, `pretrained` (a real model, which has to be installed). Each is written to
`compression.json` in the folder of `--output`, row by row (with `--data fashion-mnist` to `compression_fashion_mnist.json`,
the part `pretrained` by itself to `compression_smollm2.json`);
a run that was cut short goes on where it was, `--fresh` starts again. Prints tables and draws plots.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.common.command_line import add_part_options, parser_of, require_device, require_parts, require_positive
from benchmarks.common.llama import dense_llama
from benchmarks.common.measure import write_json
from benchmarks.common.merging import DifferentRunsError, merged_files
from benchmarks.common.parts import Part, ResultFile, run_parts
from benchmarks.compression import llama_7b, llm, pretrained, speed, vit
from benchmarks.compression.layers import both
from benchmarks.compression.methods import DEFAULT, LLM_METHODS, METHODS
from benchmarks.compression.plots import plots
from benchmarks.compression.report import TABLES, report
from benchmarks.side_tuning.bases import SHAPES
from examples import fashion_mnist
from examples.compress_vit import calibration
from examples.demo import BASE
from examples.prose import NoTextError, handbook_files
from examples.real_model import HELP, NoModelError, model_path

PARTS = tuple(TABLES)
STEPS = ("rows", "cost", "speed")
POSITIVE = (
    "calibration_blocks",
    "cost_blocks",
    "held_blocks",
    "seeds",
    "epochs",
    "vit_epochs",
    "kd_lr",
    "kd_steps",
    "images",
    "rank",
    "repeats",
    "threads",
)
QUICK = {
    "keep": [0.6],
    "vit_keep": [0.4],
    "methods": ["svd", "svd-llm", "mix", DEFAULT],
    "seeds": 2,
    "epochs": 1,
    "calibration_blocks": 8,
    "held_blocks": 8,
    "images": 64,
    "repeats": 1,
    "rank": 4,
    "widths_7b": [256, 688],
    "cost_blocks": 4,
    "pretrained_rows": [
        *((1.0, method, 2) for method in pretrained.WHOLE),
        *((0.6, method, 0) for method in pretrained.ROWS),
        (0.6, DEFAULT, 2),
    ],
    "kd_steps": 2,
}
USED = {
    "llm": ("model", "calibration_blocks", "held_blocks", "device"),
    "cost": ("model", "calibration_blocks", "layers_keep", "threads", "device"),
    "residual": ("model", "calibration_blocks", "held_blocks", "rank", "device"),
    "vit": ("epochs", "images", "device"),
    "layers": ("model", "calibration_blocks", "held_blocks", "layers_keep", "epochs", "images", "device"),
    "speed": ("model", "keep", "repeats", "threads", "device", "quick"),
    "7b": ("threads", "quick"),
    "pretrained": ("pretrained", "calibration_blocks", "held_blocks"),
}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of("benchmarks.compression", __doc__)
    add = parser.add_argument
    add("--model", default=str(BASE), help="trained language model (default: the project's)")
    add("--methods", nargs="+", choices=METHODS, help="rows of the tables (default: all; a language model's: no kd)")
    add("--keep", nargs="+", type=float, default=[0.8, 0.6, 0.4], help="parts of the language model's weights to keep")
    add("--vit-keep", nargs="+", type=float, help="the same of the vision transformer's (default: by the images)")
    add("--layers-keep", type=float, default=0.4, help="at which the costs and the layers' errors are taken")
    add("--calibration-blocks", type=int, default=64, help="blocks of 512 tokens")
    add("--held-blocks", type=int, default=64, help="held-out blocks of 512 tokens of each kind of text")
    add("--data", choices=list(vit.KEEPS), default="digits", help="images of the part vit")
    add(
        "--seeds",
        type=int,
        default=5,
        help="vision transformers to train; of fashion-mnist, draws of calibration images",
    )
    add("--first-seed", type=int, default=0, help="the first of them, so that several processes can share the seeds")
    add("--epochs", type=float, default=80, help="of their training on the digits")
    add("--vit-size", choices=list(fashion_mnist.SIZES), default="small", help="of the one for fashion-mnist")
    add("--vit-epochs", type=float, help="of its training (default: by its size)")
    add("--vit-model", help="folder of one that is trained already, in its place")
    add("--vit-variants", nargs="*", choices=list(vit.VARIANTS), default=list(vit.VARIANTS),
        help="what else is measured of its rows, when they are made: int8, a short fine-tuning (default: both)")  # fmt: skip
    add("--images", type=int, default=256, help="their calibration images")
    add("--rank", type=int, default=16, help="mean rank of the residuals")
    add("--widths-7b", nargs="+", type=int, default=[llama_7b.HIDDEN, llama_7b.INNER],
        help="widths of the layers of the part 7b that are really decomposed")  # fmt: skip
    add("--pretrained", default="smollm2", help=f"model of the part pretrained: {HELP}")
    add("--pretrained-rows", nargs="+", type=pretrained.row, default=pretrained.DEFAULT_ROWS, metavar="KEEP:METHOD[:STEPS]",
        help="rows of its tables, in the order in which they are made; STEPS of LoRA follow the compression")  # fmt: skip
    add("--text", type=Path, metavar="FILE.npz",
        help="its rows of text: written when it is not there, read when it is, for the same rows under another Python")  # fmt: skip
    add("--kd-lr", type=float, default=pretrained.KD_LEARNING_RATE, help="learning rate of its distillation")
    add("--kd-steps", type=int, default=pretrained.KD_STEPS, help="its most steps, of one calibration batch each")
    add("--cost-blocks", type=int, default=48, help="calibration blocks of its step cost")
    add("--steps", nargs="+", choices=STEPS, default=STEPS, help="what of the part pretrained to make")
    add("--merge", nargs="+", type=Path, metavar="FILE",
        help="put result files of the same arguments together, as several processes wrote them, and print the tables; "
        "of `--parts` alone")  # fmt: skip
    add("--predict-7b", action="store_true", help="the part 7b alone")
    add_part_options(parser, PARTS)
    args = parser.parse_args(argv)
    require_positive(parser, args, POSITIVE)
    require_device(parser, args)
    if args.predict_7b:
        args.parts = ["7b"]
    args.fashion = args.data == "fashion-mnist"
    if args.fashion and args.parts != ["vit"]:
        parser.error(f"--data {args.data}: goes with --parts vit, got {' '.join(args.parts)}")
    args.vit_keep = args.vit_keep or vit.KEEPS[args.data]
    require_parts(parser, args, ("keep", "vit_keep"))
    if args.quick:
        vars(args).update(QUICK)
    return args


def path_of(args: argparse.Namespace) -> Path:
    name = "_fashion_mnist" if args.fashion else "_smollm2" if args.parts == ["pretrained"] else ""
    return args.output / f"compression{name}.json"


def results_of(args: argparse.Namespace) -> ResultFile:
    return ResultFile(path_of(args), torch.device(args.device), args.fresh)


def used(args: argparse.Namespace, part: str) -> dict:
    """The arguments that a part's figures depend on."""
    values = {name: getattr(args, name) for name in USED[part]}
    if args.fashion:
        del values["epochs"]
        fashion = vit.fashion_of(args)
        made = {"vit_model": Path(fashion.model).name} if fashion.model else {"training": fashion.training}
        values |= {"quick": args.quick, "size": fashion.size, "tuning": vit.TUNING} | made
    if "pretrained" in values:
        values["pretrained"] = Path(args.pretrained).name  # wherever its folder lies
        values |= {"device": args.device} if args.device != "cpu" else {}
    return values | ({"model": llm.BASE_NAME} if "model" in values and Path(args.model) == BASE else {})


def parts_of(args: argparse.Namespace) -> dict[str, Part]:
    """The parts, each of which takes its unfinished result and a function that writes one."""
    device = torch.device(args.device)
    llm_methods = args.methods or LLM_METHODS
    on_images = vit.compare_fashion if args.fashion else vit.compare_digits

    def dense_and_text():
        dense = llm.load_dense(args.model, device)
        return dense, llm.load_text(args.model, args.calibration_blocks, args.held_blocks)

    def layers(done: dict, save) -> dict:
        if "llm" not in done:
            dense, text = dense_and_text()
            held = [{"input_ids": part} for part in text.held["stdlib"].split(llm.BATCH)]
            done["llm"] = both(dense, text.calibration, held, args.layers_keep)
            save(done)
        if "vit" not in done:
            dense = vit.digits_vit(0, args.epochs, device)
            batches, held = calibration(dense.training, args.images), calibration(dense.test, len(dense.test[0]))
            done["vit"] = both(dense.model, batches, held, args.layers_keep)
        return done

    def speeds(done: dict, save) -> dict:
        sizes = {"shapes": ((64, 64),), "rows": (1, 16), "parts": (0.4, 1.0)} if args.quick else {}
        prompt, new = (32, 4) if args.quick else (512, 32)
        if "layers" not in done:
            done["layers"] = speed.layers(repeats=args.repeats, device=device, **sizes)
            save(done)
        for name in ("base", "100m"):
            if name not in done:
                large = "tiny" if args.quick else "100m"
                dense = (
                    llm.load_dense(args.model, device)
                    if name == "base"
                    else dense_llama(SHAPES[large].config, device, torch.float32)
                )
                ranks = {f"{keep:g}": speed.uniform_ranks(dense, keep) for keep in args.keep}
                made = {"dense": dense} | {keep: speed.with_ranks(dense, those) for keep, those in ranks.items()}
                done[name] = speed.models(made, prompt, new, args.repeats, dense.config.vocab_size, device)
                save(done)
        return done

    def real_model(done: dict, save) -> dict:
        path = model_path(args.pretrained)
        sizes = args.calibration_blocks, args.held_blocks
        text = pretrained.load_text(path, *sizes, args.text) if "rows" in args.steps else None
        dense = llm.load_dense(path, device)
        if text is not None:
            pretrained.rows(dense, path, text, args.pretrained_rows, done, save, args.kd_lr, args.kd_steps)
        if "cost" in args.steps:
            methods = args.methods or ["svd-llm", DEFAULT]
            text = pretrained.load_text(path, args.cost_blocks, args.held_blocks)
            done["cost"] = llm.cost(
                dense, text, methods, 0.8, done.get("cost", {}), lambda cost: save(done | {"cost": cost})
            )
        if "speed" in args.steps and "speed" not in done:
            done["speed"] = pretrained.tokens_a_second(dense, done, args.repeats, device)
        return done

    return {
        "llm": lambda done, save: llm.compare(*dense_and_text(), llm_methods, args.keep, done, save),
        "cost": lambda done, save: llm.cost(*dense_and_text(), llm_methods, args.layers_keep, done, save),
        "residual": lambda done, save: llm.residuals(*dense_and_text(), args.model, args.rank, done, save),
        "vit": lambda done, save: on_images(args, done, save),
        "layers": layers,
        "speed": speeds,
        "7b": lambda done, save: llama_7b.measured(256 if args.quick else llama_7b.HIDDEN, args.widths_7b, done, save),
        "pretrained": real_model,
    }


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    # float32 throughout: the convolution that cuts an image into patches would round its inputs.
    torch.backends.cudnn.allow_tf32 = False
    if args.merge:
        try:
            found = {part: entry for part, entry in merged_files(args.merge).items() if part in args.parts}
        except DifferentRunsError as error:
            raise SystemExit(str(error)) from None
        write_json(path_of(args), found)
        print(report({part: entry["result"] for part, entry in found.items()}, list(found)))
        return
    if args.fashion:
        try:
            fashion_mnist.find()
        except fashion_mnist.NoImagesError as missing:
            print(f"skipped: {missing}")
            return
    if "pretrained" in args.parts:
        try:
            model_path(args.pretrained)
            if args.text is None or not args.text.exists():
                handbook_files()
        except (NoModelError, NoTextError) as error:
            print(f"the part 'pretrained' is left out: {error}")
            args.parts = [part for part in args.parts if part != "pretrained"]
    run_parts(args, results_of(args), parts_of(args), used, report, plots)


if __name__ == "__main__":
    main()
