"""A sweep over learning rates and sizes on one cache of hidden states, against the same sweep with QLoRA.

    python -m benchmarks.side_tuning.cached_sweep --model smollm2
    python -m benchmarks.side_tuning.cached_sweep --rates 1e-3 2e-3 4e-3 --sizes 3 6 --epochs 3

The base runs once over the text; every run of QST reads what it stored, because what is stored does not depend on `r`.
QLoRA runs the base forward and backward in every step of every run. Prints seconds and held-out losses of both sweeps and
writes `benchmarks/results/side_cached_sweep.json`.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer, get_linear_schedule_with_warmup, set_seed

from benchmarks.common.command_line import as_json, parser_of, require_positive
from benchmarks.common.measure import RESULTS, environment, write_json
from benchmarks.common.tables import markdown
from benchmarks.common.timing import processor_clock
from benchmarks.side_tuning.tasks import TASKS, Batch
from examples.demo import load_base
from examples.real_model import HELP, model_argument
from hf_qst import QSTConfig
from hf_qst.qst import HiddenStateCacheConfig, fill_hidden_state_cache


def train(
    base: nn.Module, config: PeftConfig, rate: float, batches: list[Batch], held: list[Batch], epochs: int
) -> float:
    """The held-out loss of an adapter after some epochs, each in another order; the rate rises, and falls to zero."""
    set_seed(0)
    model = get_peft_model(copy.deepcopy(base), copy.deepcopy(config)).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    steps = [i for _ in range(epochs) for i in torch.randperm(len(batches)).tolist()]
    schedule = get_linear_schedule_with_warmup(optimizer, min(5, len(steps) // 4), len(steps))
    for index in tqdm(steps, unit="step", leave=False):
        batch = batches[index]
        model(input_ids=batch.ids, labels=batch.labels, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        losses = [model(input_ids=b.ids, labels=b.labels, use_cache=False).loss.item() for b in held]
    return sum(losses) / len(losses)


def main(argv: list[str] | None = None) -> None:
    parser = parser_of("benchmarks.side_tuning.cached_sweep", __doc__)
    add = parser.add_argument
    add("--model", type=model_argument, default="smollm2", help=HELP)
    add("--rates", type=float, nargs="+", default=[1e-3, 2e-3])
    add("--sizes", type=int, nargs="+", default=[3, 6], help="reduction factors r of QST")
    add("--ranks", type=int, nargs="+", default=[8, 16], help="ranks of QLoRA")
    add("--batches", type=int, default=8, help="batches of two rows of 256 tokens")
    add("--held", type=int, default=2, help="held-out batches")
    add("--epochs", type=int, default=3)
    add("--storage", choices=("full", "bfloat16", "int8"), default="int8")
    add("--threads", type=int, default=1)
    add("--output", type=Path, default=RESULTS / "side_cached_sweep.json")
    args = parser.parse_args(argv)
    require_positive(parser, args, ("batches", "held", "epochs", "threads"))
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()

    base = load_base(args.model, "cpu")
    task = TASKS["prose"](AutoTokenizer.from_pretrained(args.model), args.batches, 0)
    train_batches, held = task.train, task.held[: args.held]
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        cache = HiddenStateCacheConfig(folder, args.storage)

        def side(r: int) -> QSTConfig:
            return QSTConfig(task_type="CAUSAL_LM", r=r, hidden_state_cache=cache)

        def lora(rank: int) -> LoraConfig:
            return LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules=linear)

        start = processor_clock()
        filled = get_peft_model(copy.deepcopy(base), side(args.sizes[0]))
        report = fill_hidden_state_cache(filled, [{"input_ids": b.ids} for b in (*train_batches, *held)])
        fill_seconds = processor_clock() - start
        for method, make, sizes in (("QST", side, args.sizes), ("QLoRA", lora, args.ranks)):
            runs = []
            for size in sizes:
                for rate in args.rates:
                    start = processor_clock()
                    loss = train(base, make(size), rate, train_batches, held, args.epochs)
                    runs.append({"size": size, "rate": rate, "loss": loss, "seconds": processor_clock() - start})
                    print(f"{method} {size}, rate {rate:g}: {loss:.4f} in {runs[-1]['seconds']:.0f} s", flush=True)
            results[method] = {"runs": runs, "seconds": sum(run["seconds"] for run in runs)}
    results["QST"]["seconds"] += fill_seconds
    cost = {"fill_seconds": fill_seconds, "bytes": report.bytes_written, "tokens": report.tokens}
    result = {**environment(torch.device("cpu")), "arguments": as_json(vars(args)), "cache": cost, "sweeps": results}
    result["ratio"] = results["QLoRA"]["seconds"] / results["QST"]["seconds"]
    write_json(args.output, result)
    lines = [
        [method, str(len(sweep["runs"])), f"{sweep['seconds']:.0f}", f"{min(run['loss'] for run in sweep['runs']):.4f}"]
        for method, sweep in results.items()
    ]
    print(markdown(["sweep", "runs", "seconds, the cache's included", "best held-out loss"], lines))
    print(f"filling: {fill_seconds:.0f} s, {report.bytes_written / 2**20:.0f} MiB for {report.tokens:,} tokens")
    print(f"QLoRA's sweep takes {result['ratio']:.1f} times as long; written: {args.output}")


if __name__ == "__main__":
    main()
