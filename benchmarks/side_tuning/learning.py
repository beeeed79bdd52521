"""The held-out loss of QST's variants after equal steps: one base, the same batches for all.

    python -m benchmarks.side_tuning.learning --only mix peer --steps 40 --rates 4e-3 --held-blocks 32

Compares the mix's start, the default against the paper's, with QLoRA as the peer. Every variant runs at each learning
rate of `--rates` and is listed at its best one.
"""

import math
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from benchmarks.common.command_line import as_json, parser_of
from benchmarks.common.measure import RESULTS, environment, write_json
from benchmarks.side_tuning.bases import Text, copy_of, demo_text, load_base
from benchmarks.side_tuning.methods import Method, Run
from examples.corpus import held_out_loss
from hf_qst import QSTConfig


def side(**changes) -> QSTConfig:
    """The default at r=4, with changes."""
    return QSTConfig(**{"task_type": "CAUSAL_LM", "r": 4, **changes})


PAPER = {"mix": "paper", "side_heads": "keep", "tap_storage": "full"}
# Groups of named configurations; each differs in one thing from `side()`.
GROUPS = {
    "mix": {
        "residual": side(),
        "residual, vector": side(mix_shape="vector"),
        "residual, alpha lr x10": side(mix_lr_scale=10.0),
        "paper": side(**PAPER),
        "paper, alpha lr x10": side(**PAPER, mix_lr_scale=10.0),
        "authors' code": QSTConfig.reference(task_type="CAUSAL_LM", r=4),
    },
    "peer": {"QLoRA": LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")},
}


def train(base, config, rate: float, text: Text, args) -> dict:
    """One run: `args.steps` steps at a rate that rises and falls linearly, the same batches for every variant."""
    method = Method("", lambda base, _: get_peft_model(base, config), rate)
    run = Run(method, copy_of(base), torch.device(args.device), [], seed=args.seed)
    warmup = max(1, args.steps // 20)
    started = time.perf_counter()
    for step in tqdm(range(args.steps), leave=False, unit="step"):
        rows = text.train[step * args.batch : (step + 1) * args.batch].to(run.device)
        run.step(rows, step / warmup if step < warmup else (args.steps - step) / max(1, args.steps - warmup))
    seconds = time.perf_counter() - started
    return {"rate": rate, "loss": run.held_out_loss(text.held_out), "seconds": seconds, "trainable": run.count()}


def main(argv: list[str] | None = None) -> None:
    parser = parser_of("benchmarks.side_tuning.learning", __doc__)
    add = parser.add_argument
    add("--model", help="base model: a folder or a hub name (default: the project's)")
    add("--steps", type=int, default=120)
    add("--batch", type=int, default=8, help="blocks a step")
    add("--length", type=int, default=256, help="tokens a block")
    add("--held-blocks", type=int, default=96)
    add("--rates", type=float, nargs="+", default=[2e-3, 4e-3])
    add("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups to run")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=RESULTS / "side_learning.json")
    args = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()

    device = torch.device(args.device)
    base = load_base("demo", args.model, device, packed=False)
    text = demo_text(args.model, args.length, args.held_blocks, args.seed)
    start = held_out_loss(base, text.held_out, args.batch)
    print(f"base: held-out loss {start:.4f} (perplexity {math.exp(start):.2f})")

    rows = {}
    for group in args.only:
        for name, config in GROUPS[group].items():
            runs = [train(base, config, rate, text, args) for rate in args.rates]
            best = min(runs, key=lambda run: run["loss"])
            rows[f"{group}: {name}"] = {"best": best, "runs": runs}
            losses = "  ".join(f"{run['loss']:.4f} @ {run['rate']:g}" for run in runs)
            print(f"{group}: {name}: {best['loss']:.4f}, {best['trainable']:,} parameters [{losses}]", flush=True)
    report = {"base_loss": start, "arguments": as_json(vars(args)), **environment(device), "rows": rows}
    write_json(args.output, report)
    print(f"Wrote {args.output}")


if __name__ == "__main__":
    main()
