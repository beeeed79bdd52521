"""How side networks learn on a real pretrained model, trained on stored hidden states of its frozen base.

    python -m benchmarks.side_tuning.stored_states --model smollm2 --steps 40 120
    python -m benchmarks.side_tuning.stored_states --only default paper --rates 2e-3 --seeds 0 1 2

The base is the same for every variant and never changes, so its states are computed once for each batch; a variant's
step is then the side network, the head and the optimiser. The side network is the library's own and gives the same loss
as inside the model, which the script checks for the first batch. QLoRA, whose backward pass goes through the base, is
trained in full beside them. Every variant is listed at the best of its learning rates, with the part of QLoRA's gain
over the base that it reaches.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from tqdm.auto import tqdm
from transformers import AutoTokenizer, get_linear_schedule_with_warmup, set_seed

from benchmarks.common.measure import environment, write_json
from examples.corpus import blocks, held_out_loss, split, tokens
from examples.demo import load_base
from examples.prose import handbook_files
from examples.real_model import HELP, model_argument
from hf_qst import QSTConfig
from hf_qst.qst import Taps
from hf_qst_kernels import linear_cross_entropy

RESULTS = Path(__file__).parents[1] / "results"


def variants() -> dict[str, QSTConfig]:
    """Named configurations of QST; each differs in one thing from the default, or is the paper's."""

    def side(**changes):
        return QSTConfig(**{"task_type": "CAUSAL_LM", **changes})

    return {
        "default": side(),
        "paper": QSTConfig.paper(task_type="CAUSAL_LM"),
        "before": side(r=16, side_every=1, readout_rank=0, downsample_input_norm=False),
        "no readout": side(readout_rank=0),
        "no input norm": side(downsample_input_norm=False),
        "all blocks, r=16": side(r=16, side_every=1),
        "readout rank 32": side(readout_rank=32),
        "readout every block": side(readout_every=1),
        "side every 3": side(side_every=3),
        "side every 10": side(side_every=10),
        "r=3": side(r=3),
        "principal": side(downsample="principal"),
    }


@dataclass
class Step:
    """Of one batch: the state entering each block and those leaving it [batch, seq, d] in float16, what the base gave
    each block, the normalised output of the stack in float32, and the token ids."""

    states: list[torch.Tensor]
    contexts: list
    output: torch.Tensor
    ids: torch.Tensor


class Recording:
    """Takes the place of a side network's recorder: keeps the states instead of reading them."""

    tail = None

    def __init__(self):
        self.states, self.contexts = [], []

    def reads(self, index) -> bool:
        return True

    def record(self, index, entering, leaving, context) -> None:
        if index == 0:
            self.states.append(entering.half())
        self.states.append(leaving.half())
        self.contexts.append(context)


class StoredBase:
    """A base with its head, and the states that it gives for batches."""

    def __init__(self, base):
        # Its hooks around the blocks are wanted, and a side network away from its start, for the check.
        self.model = get_peft_model(copy.deepcopy(base), QSTConfig(task_type="CAUSAL_LM", init_weights=False))
        self.layer = self.model.base_model.model.model
        self.head = self.model.get_output_embeddings().weight.detach()
        self.last_context = None

    @torch.no_grad()
    def step(self, ids: torch.Tensor) -> Step:
        recording = Recording()
        self.model.eval()
        with self.layer.tape.using(recording):
            output = self.layer.base_layer(input_ids=ids, use_cache=False)
        # Masks and rotary tables of equal batches are equal: one copy is kept.
        self.last_context = self.last_context or recording.contexts
        return Step(recording.states, self.last_context, output[0], ids)

    @torch.no_grad()
    def check(self, step: Step) -> None:
        """Compare the loss on stored states with that of the model itself.

        Raises:
            RuntimeError: they differ by more than the states' rounding to float16 explains.
        """
        network = self.layer.active_network()
        stored, whole = self.loss(network, step).item(), self.model(input_ids=step.ids, labels=step.ids).loss.item()
        print(f"loss of a random side network on stored states {stored:.5f}, in the model {whole:.5f}")
        if abs(stored - whole) > 1e-3 * abs(whole):
            raise RuntimeError(f"the loss on stored states is {stored}, in the model {whole}")

    def loss(self, network, step: Step) -> torch.Tensor:
        """The side-tuned model's mean loss in nats a token."""
        taps = Taps()
        for i, context in enumerate(step.contexts):
            entering, leaving = step.states[i].float(), step.states[i + 1].float()
            network.record(taps, i, entering, leaving, context)
        hidden = network.mix(step.output, network(taps))
        labels = step.ids[:, 1:].reshape(-1)
        return linear_cross_entropy(hidden[:, :-1].reshape(len(labels), -1), self.head, labels)


def train(parameters: list, losses: Iterable[torch.Tensor], steps: int, rate: float) -> float:
    """A step of AdamW for each loss, with the rate falling to zero; seconds a step."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 5, steps)
    started = time.perf_counter()
    for loss in losses:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return (time.perf_counter() - started) / steps


def train_side(base, stored: StoredBase, config, rate: float, seed: int, batches: list[Step], held: list[Step]) -> dict:
    """One run on stored states: one step a batch."""
    set_seed(seed)
    model = get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
    network = model.base_model.model.model.qst_net["default"].train()
    parameters = [p for p in network.parameters() if p.requires_grad]
    seconds = train(parameters, (stored.loss(network, step) for step in batches), len(batches), rate)
    network.eval()
    with torch.no_grad():
        loss = sum(stored.loss(network, step).item() for step in held) / len(held)
    return _run(rate, seed, loss, parameters, seconds)


def train_qlora(base, rate: float, seed: int, rows: torch.Tensor, batch: int, held: torch.Tensor) -> dict:
    """QLoRA of rank 16 in every linear layer, on the same batches."""
    set_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(copy.deepcopy(base), config).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    bar = tqdm(rows.split(batch), desc=f"QLoRA at {rate:g}", unit="step")
    losses = (model(input_ids=ids, labels=ids, use_cache=False).loss for ids in bar)
    seconds = train(parameters, losses, len(bar), rate)
    return _run(rate, seed, held_out_loss(model, held, batch), parameters, seconds)


def _run(rate: float, seed: int, loss: float, parameters: list, seconds: float) -> dict:
    count = sum(p.numel() for p in parameters)
    return {"rate": rate, "seed": seed, "loss": loss, "parameters": count, "seconds_per_step": seconds}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=model_argument, default="smollm2", help=HELP)
    parser.add_argument("--steps", type=int, nargs="+", default=[40, 120])
    parser.add_argument("--batch", type=int, default=2, help="blocks a step")
    parser.add_argument("--length", type=int, default=256, help="tokens a block")
    parser.add_argument("--held-blocks", type=int, default=16)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", help=f"of {', '.join(variants())}, QLoRA")
    parser.add_argument("--output", type=Path, default=RESULTS / "side_tuning_stored_states.json")
    args = parser.parse_args(argv)
    chosen = args.only or [*variants(), "QLoRA"]
    unknown = set(chosen) - {*variants(), "QLoRA"}
    if unknown:
        parser.error(f"--only must name some of {', '.join(variants())}, QLoRA, got {', '.join(sorted(unknown))}")
    transformers.utils.logging.set_verbosity_error()

    path = args.model
    tokenizer = AutoTokenizer.from_pretrained(path)
    base = load_base(path, "cpu")
    files, held_files = split(handbook_files(), held_out=0.1)
    rows = blocks(tokens(files, tokenizer), args.length)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))][: max(args.steps) * args.batch]
    held = blocks(tokens(held_files, tokenizer), args.length, args.held_blocks)
    start = held_out_loss(base, held, args.batch)
    print(f"base: held-out loss {start:.4f}", flush=True)

    report = {"base_loss": start, "model": args.model, "batch": args.batch, "length": args.length}
    report |= {**environment(torch.device("cpu")), "rows": []}
    stored = StoredBase(base)
    batches = [stored.step(ids) for ids in tqdm(rows.split(args.batch), desc="states of the base", unit="batch")]
    stored.check(batches[0])
    held_steps = [stored.step(ids) for ids in held.split(args.batch)]
    for steps in args.steps:
        for name in chosen:
            runs = []
            for seed in args.seeds:
                for rate in args.rates:
                    if name == "QLoRA":
                        run = train_qlora(base, rate, seed, rows[: steps * args.batch], args.batch, held)
                    else:
                        run = train_side(base, stored, variants()[name], rate, seed, batches[:steps], held_steps)
                    runs.append(run)
            report["rows"].append({"variant": name, "steps": steps, "runs": runs})
            best = min(runs, key=lambda run: run["loss"])
            each = "  ".join(f"{run['loss']:.4f} @ {run['rate']:g}" for run in runs)
            print(
                f"{steps:5d} {name:22s} {best['loss']:.4f}  {best['parameters'] / 1e6:.2f} M  "
                f"{best['seconds_per_step']:.2f} s/step  [{each}]",
                flush=True,
            )
            write_json(args.output, report)
    print(f"Wrote {args.output}")


if __name__ == "__main__":
    main()
