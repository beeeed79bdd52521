"""Many side networks on one pass of the base: what a mixed batch, a shared prompt and training together cost.

    python -m benchmarks.side_tuning.many_side_networks
    python -m benchmarks.side_tuning.many_side_networks --shape tiny --repeats 1 --out FOLDER     # shows that it runs

All models hold the same 4-bit base. Compared are a batch whose rows have different adapters with the same batch under one,
a prompt that is prefilled once with one prefill for each adapter, and a training step of all adapters with the bare forward
of the base, steps of one adapter and steps of QLoRA. Every result is compared with that of each adapter alone. Prints a
table and writes it to `benchmarks/results/side_tuning_many_networks.json`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median

import torch
from peft import get_peft_model
from torch import nn

from benchmarks.common.command_line import as_json, parser_of, require_device, require_positive
from benchmarks.common.measure import RESULTS, environment, write_json
from benchmarks.common.tables import markdown
from benchmarks.common.timing import in_turns
from benchmarks.side_tuning import bases
from benchmarks.side_tuning.methods import METHODS, QST_LR, Floor, Method, Run
from hf_qst import QSTConfig
from hf_qst.qst import learn_apart, prefill

MIXED_TARGET = 1.3
TRAINING_TARGET = 1.1
EQUAL_TARGET = 1e-6


def with_adapters(base: nn.Module, count: int, seed: int = 0, **settings) -> nn.Module:
    """A model with side networks called n0, n1, ...; each has the weights that its own seed gives."""
    model = None
    for i in range(count):
        torch.manual_seed(seed + i)
        config = QSTConfig(task_type="CAUSAL_LM", **settings)
        if model is None:
            model = get_peft_model(base, config, adapter_name="n0")
        else:
            model.add_adapter(f"n{i}", config)
    return model


def together(count: int) -> Method:
    def make(base, calibration):
        model = with_adapters(base, count, init_weights=False)
        learn_apart(model)
        return model

    return Method(f"{count} together", make, QST_LR, runs_base=True)


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    """Largest difference, as a part of the largest value."""
    return ((left - right).abs().max() / right.abs().max()).item()


@torch.no_grad()
def serving(base: nn.Module, args: argparse.Namespace, device: torch.device) -> dict:
    """Seconds of a batch, of decoding and of prompts, and the largest difference from each adapter alone."""
    count = args.adapters
    model = with_adapters(bases.copy_of(base), count, init_weights=False).eval()
    names = [f"n{i}" for i in range(count)]
    vocabulary = base.config.vocab_size
    ids = bases.random_tokens(vocabulary, count, args.prompt, args.seed).to(device)
    start, prompt = ids[:, : args.start], ids[:1]
    length = {"min_new_tokens": args.new, "max_new_tokens": args.new, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(start)

    def generate(**more):
        return model.generate(input_ids=start, attention_mask=mask, **length, **more)

    def prompts_of_each():
        for name in names:
            model(input_ids=prompt, adapter_names=[name], use_cache=True, logits_to_keep=1)

    calls = {
        "batch, one adapter": lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1),
        "batch, mixed": lambda: model(input_ids=ids, adapter_names=names, use_cache=False, logits_to_keep=1),
        "tokens, one adapter": generate,
        "tokens, mixed": lambda: generate(adapter_names=names),
        "prompt, each by itself": prompts_of_each,
        "prompt, shared": lambda: prefill(model, names, input_ids=prompt),
    }
    times = in_turns(calls, args.repeats, device)
    seconds = {name: median(rounds) for name, rounds in times.items()}
    mixed = model(input_ids=ids, adapter_names=names, use_cache=False).logits
    written = generate(adapter_names=names)
    worst, least, same = 0.0, float("inf"), True
    for row, name in enumerate(names):
        model.set_adapter(name)
        logits = model(input_ids=ids, use_cache=False).logits
        worst = max(worst, difference(mixed[row], logits[row]))
        least = min(least, *(difference(mixed[other], logits[other]) for other in range(count) if other != row))
        same &= torch.equal(written[row], generate()[row])
    return {
        "seconds": seconds,
        "batch_ratio": seconds["batch, mixed"] / seconds["batch, one adapter"],
        "tokens_ratio": seconds["tokens, mixed"] / seconds["tokens, one adapter"],
        "prompt_gain": seconds["prompt, each by itself"] / seconds["prompt, shared"],
        "largest_difference": worst,
        "least_difference_of_adapters": least,
        "same_tokens": same,
    }


def training(base: nn.Module, args: argparse.Namespace, device: torch.device) -> dict:
    """Seconds of a step, and the largest differences of losses and gradients from each adapter alone."""
    count = args.adapters
    settings = bases.SHAPES[args.shape]
    ids = bases.random_tokens(base.config.vocab_size, args.batch or settings.batch, args.seq or settings.seq).to(device)
    runs = {
        "QST, one": Run(METHODS["qst"], bases.copy_of(base), device, []),
        "QST, together": Run(together(count), bases.copy_of(base), device, []),
        "QLoRA": Run(METHODS["qlora"], bases.copy_of(base), device, []),
    }
    worst = _compare(base, runs["QST, together"], ids, device, count)
    floor = Floor(bases.copy_of(base), device)
    calls = {"forward of the base": lambda: floor.forward(ids)}
    calls |= {name: lambda run=run: run.step(ids) for name, run in runs.items()}
    times = in_turns(calls, args.repeats, device)
    seconds = {name: median(rounds) for name, rounds in times.items()}
    forward, one = seconds["forward of the base"], seconds["QST, one"]
    return {
        "seconds": seconds,
        "limit": forward + count * (one - forward),
        "of_limit": seconds["QST, together"] / (forward + count * (one - forward)),
        "of_single_steps": seconds["QST, together"] / (count * one),
        "qlora_ratio": count * seconds["QLoRA"] / seconds["QST, together"],
        "largest_difference": worst,
    }


def _compare(base: nn.Module, run: Run, ids: torch.Tensor, device: torch.device, count: int) -> float:
    """Largest difference of a gradient, as a part of the largest of its tensor, from training each network alone."""
    run.loss(ids).backward()
    own = dict(run.model.named_parameters())
    worst = 0.0
    for i in range(count):
        method = Method("alone", lambda b, _, i=i: with_adapters(b, 1, i, init_weights=False), QST_LR)
        alone = Run(method, bases.copy_of(base), device, [], seed=i)
        alone.loss(ids).backward()
        for name, parameter in alone.model.named_parameters():
            if parameter.grad is not None:
                worst = max(worst, difference(own[name.replace(".n0.", f".n{i}.")].grad, parameter.grad))
    run.optimizer.zero_grad(set_to_none=True)
    return worst


def main(argv: list[str] | None = None) -> None:
    parser = parser_of("benchmarks.side_tuning.many_side_networks", __doc__)
    add = parser.add_argument
    add("--shape", choices=[name for name, shape in bases.SHAPES.items() if shape.config], default="100m", help="base")
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add("--adapters", type=int, default=8, help="side networks, and rows of a batch")
    add("--prompt", type=int, default=128, help="tokens of a row of the batch")
    add("--start", type=int, default=16, help="tokens before those that are written")
    add("--new", type=int, default=8, help="tokens written")
    add("--batch", type=int, help="sequences of a training step; without it, the shape's")
    add("--seq", type=int, help="tokens of each; without it, the shape's")
    add("--repeats", type=int, default=5, help="timed rounds")
    add("--threads", type=int, default=2, help="CPU threads")
    add("--seed", type=int, default=0, help="of weights and tokens")
    add("--out", type=Path, default=RESULTS, help="folder of the result")
    args = parser.parse_args(argv)
    require_positive(parser, args, ("prompt", "start", "new", "batch", "seq", "repeats", "threads"))
    require_device(parser, args)
    if args.adapters < 2:
        parser.error(f"--adapters {args.adapters}: give two or more")
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    base = bases.load_base(args.shape, None, device, packed=False, seed=args.seed)
    served, trained = serving(base, args, device), training(base, args, device)
    values = {
        f"a batch under {args.adapters} adapters, times that under one": (served["batch_ratio"], MIXED_TARGET),
        "the same while tokens are written": (served["tokens_ratio"], None),
        "a prompt for each adapter, times one that is shared": (served["prompt_gain"], None),
        "training together, of forward + side networks and heads": (trained["of_limit"], TRAINING_TARGET),
        "training together, of as many steps of one": (trained["of_single_steps"], None),
        "as many steps of QLoRA, times training together": (trained["qlora_ratio"], None),
        "largest relative difference from each alone": (
            max(served["largest_difference"], trained["largest_difference"]),
            EQUAL_TARGET,
        ),
    }
    rows = [[name, f"{value:.3g}", "" if most is None else f"<= {most:g}"] for name, (value, most) in values.items()]
    print(markdown(["", "measured", "aim"], rows))
    for part in (served, trained):
        print(markdown(["", "seconds"], [[name, f"{value:.4f}"] for name, value in part["seconds"].items()]))
    print(f"adapters differ by {served['least_difference_of_adapters']:.3g} or more of the largest logit")
    print(f"tokens written in the mixed batch are those of each adapter alone: {served['same_tokens']}")
    result = {**environment(device), "arguments": as_json(vars(args)), "serving": served, "training": trained}
    write_json(args.out / "side_tuning_many_networks.json", result)


if __name__ == "__main__":
    main()
