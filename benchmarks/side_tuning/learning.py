"""The held-out loss of QST's variants after equal steps: one base, the same batches for all.

    python -m benchmarks.side_tuning.learning                       # the table of docs/results.md
    python -m benchmarks.side_tuning.learning --only mix --steps 60

Compares the mix's start (the default against the paper's), the downsamplers, the reduction factors and where the taps
are kept; QLoRA stands beside them. Every variant runs at each learning rate of `--rates` and is listed at its best one.
"""

import copy
import math
import time
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from tqdm.auto import tqdm
from transformers import AutoTokenizer, get_linear_schedule_with_warmup, set_seed

from benchmarks.common.command_line import as_json, parser_of
from benchmarks.common.measure import RESULTS, environment, write_json
from examples.corpus import blocks, held_out_loss, split, tokens, transformers_files
from examples.demo import BASE, load_base
from hf_qst import QSTConfig


def variants(calibration: list[dict]) -> dict[str, dict]:
    """Groups of named configurations; each differs in one thing from `side`, the default at r=4."""

    def side(**changes):
        return QSTConfig(**{"task_type": "CAUSAL_LM", "r": 4, **changes})

    def principal(**changes):
        return side(downsample="principal", calibration_data=calibration, **changes)

    paper = {"mix": "paper", "side_heads": "keep", "tap_storage": "full"}
    return {
        "mix": {
            "residual": side(),
            "residual, vector": side(mix_shape="vector"),
            "residual, alpha lr x10": side(mix_lr_scale=10.0),
            "paper": side(**paper),
            "paper, alpha lr x10": side(**paper, mix_lr_scale=10.0),
            "authors' code": QSTConfig.reference(task_type="CAUSAL_LM", r=4),
        },
        "downsample": {
            **{kind: side(downsample=kind) for kind in ("linear", "lora", "maxpool", "avgpool")},
            "principal, fitted": principal(),
            "principal, random": side(downsample="principal"),
        },
        "taps": {"full": side(tap_storage="full")},
        "r": {**{f"r={r}": side(r=r) for r in (2, 8, 16)}, "r=2, principal": principal(r=2)},
        "peer": {"QLoRA": LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")},
    }


def train(base, config, rate: float, data: dict, args) -> dict:
    """One run: `args.steps` steps of AdamW with a linear schedule, the same batches for every variant."""
    set_seed(args.seed)
    model = get_peft_model(copy.deepcopy(base), config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, max(1, args.steps // 20), args.steps)
    order = torch.randperm(len(data["train"]), generator=torch.Generator().manual_seed(args.seed))
    model.train()
    started = time.perf_counter()
    for step in tqdm(range(args.steps), leave=False, unit="step"):
        rows = data["train"][order[step * args.batch : (step + 1) * args.batch]].to(base.device)
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    seconds, trainable = time.perf_counter() - started, sum(p.numel() for p in parameters)
    loss = held_out_loss(model, data["held"], args.batch)
    return {"rate": rate, "loss": loss, "seconds": seconds, "trainable": trainable}


def main() -> None:
    parser = parser_of("benchmarks.side_tuning.learning", __doc__)
    parser.add_argument("--model", default=str(BASE), help="base model: a folder or a hub name")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=8, help="blocks a step")
    parser.add_argument("--length", type=int, default=256, help="tokens a block")
    parser.add_argument("--held-blocks", type=int, default=96)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 4e-3])
    parser.add_argument("--only", nargs="+", help="groups to run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "side_learning.json")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = load_base(args.model, args.device)
    train_files, held_files = split(transformers_files())
    data = {
        "train": blocks(tokens(train_files, tokenizer), args.length),
        "held": blocks(tokens(held_files, tokenizer), args.length, args.held_blocks),
    }
    calibration = [{"input_ids": rows} for rows in data["train"][:32].split(args.batch)]
    start = held_out_loss(base, data["held"], args.batch)
    print(f"base: held-out loss {start:.4f} (perplexity {math.exp(start):.2f})")

    groups = variants(calibration)
    unknown = set(args.only or ()) - groups.keys()
    if unknown:
        parser.error(f"--only must name groups of {', '.join(groups)}, got {', '.join(sorted(unknown))}")
    table = {}
    for group in args.only or groups:
        for name, config in groups[group].items():
            runs = [train(base, config, rate, data, args) for rate in args.rates]
            best = min(runs, key=lambda run: run["loss"])
            table[f"{group}: {name}"] = {"best": best, "runs": runs}
            losses = "  ".join(f"{run['loss']:.4f} @ {run['rate']:g}" for run in runs)
            print(
                f"{group + ': ' + name:36s} {best['loss']:.4f}  {best['trainable']:>9,} parameters   [{losses}]",
                flush=True,
            )
    report = {
        "base_loss": start,
        "arguments": as_json(vars(args)),
        **environment(torch.device(args.device)),
        "rows": table,
    }
    write_json(args.output, report)
    print(f"Wrote {args.output}")


if __name__ == "__main__":
    main()
