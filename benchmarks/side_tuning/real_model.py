"""Side tuning and its peers on a real pretrained model and real tasks: held-out loss, accuracy, forgetting, cost.

    python -m benchmarks.side_tuning.real_model --model smollm2 --task prose --steps 40 120
    python -m benchmarks.side_tuning.real_model --task sentiment --steps 150 --seeds 0 1 2 --only default QLoRA
    python -m benchmarks.side_tuning.real_model --cost           # a step of each in the model: seconds, kept bytes

QST and LoRA in the last blocks run on stored hidden states of the base (`benchmarks.side_tuning.stored_states`), with the
loss that they have in the model, which the script checks for QST; the other peers are trained in full. Every method gets the same batches and every rate of
`--rates`, and is listed at the best, chosen on the held-out batches. Results are added to
`benchmarks/results/side_tuning_real_model.json`, run by run; runs that are in it are not repeated. The picture beside it
shows the loss on prose against seconds and kept bytes.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

import torch
import transformers
from peft import LoraConfig, ShadowConfig, get_peft_model
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer, get_linear_schedule_with_warmup, set_seed

from benchmarks.common.command_line import as_json, parser_of, require_positive
from benchmarks.common.measure import RESULTS, environment, write_json
from benchmarks.common.timing import in_turns, processor_clock
from benchmarks.side_tuning.real_model_report import picture, table
from benchmarks.side_tuning.stored_states import Step, StoredBase, hidden, last_blocks, states_read
from benchmarks.side_tuning.tasks import IGNORED, TASKS, Batch, Task, accuracy
from examples.demo import load_base
from examples.real_model import HELP, model_argument
from hf_qst import QSTConfig
from hf_qst.planning import SavedForBackward

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _side(**changes) -> QSTConfig:
    return QSTConfig(**{"task_type": "CAUSAL_LM", **changes})


def _lora(**changes) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=LINEAR, **changes)


def _last(count: int) -> Callable[[int], LoraConfig]:
    return lambda layers: _lora(layers_to_transform=list(range(layers - count, layers)), layers_pattern="layers")


VARIANTS = {
    "default": _side(),
    "paper": QSTConfig.paper(task_type="CAUSAL_LM"),
    "before": _side(r=16, side_every=1, readout_rank=0, downsample_input_norm=False),
    "tail 2": _side(tail_layers=2),
    "tail 4": _side(tail_layers=4),
    "tail 8": _side(tail_layers=8),
    "tail 10": _side(tail_layers=10),
    "no readout": _side(readout_rank=0),
    "no input norm": _side(downsample_input_norm=False),
    "all blocks, r=16": _side(r=16, side_every=1),
    "readout rank 32": _side(readout_rank=32),
    "readout every block": _side(readout_every=1),
    "r=3": _side(r=3),
    "principal": _side(downsample="principal"),
    "default, near the base": _side(),
}
"""Configurations of QST; each differs in one thing from the default, or is the paper's, or is named `before`."""
NEAR = {"default, near the base": 10.0}
"""Of variants, a weight: of the squared distance of the output from the base's where there is no label, relative to it."""
PROBE = "linear probe"
PEERS = {
    "QLoRA": lambda layers: _lora(),
    "QLoRA, checkpointed": lambda layers: _lora(),
    "LoRA in the last 4": _last(4),
    "LoRA in the last 8": _last(8),
    "LoRA in the last 10": _last(10),
    "ShadowPEFT": lambda layers: ShadowConfig(task_type="CAUSAL_LM", shadow_dropout=0.0),
    "head alone": lambda layers: None,
    PROBE: lambda layers: None,
}
"""Number of blocks -> PEFT's configuration; `head alone` trains the weight of the head. The probe is for classifications:
logistic regression on what the base's states have where the label is predicted and in the mean over the prompt, with a
weight of its penalty in place of a rate."""
SHOWN = ("paper", "default", "tail 2", "tail 4", "tail 8", *(name for name in PEERS if name != PROBE))


class Bench:
    """A base, a task, and the states of the base for its batches that the methods called `names` read."""

    def __init__(self, base: nn.Module, task: Task, names: Iterable[str]):
        self.base, self.task = base, task
        self.layers = base.config.num_hidden_layers
        self.stored = StoredBase(base)
        wanted = set().union(*map(self._states_read, names))

        def steps(batches: list[Batch], name: str) -> list[Step]:
            bar = tqdm(batches, desc=f"states of the base, {name}", leave=False)
            return [self.stored.step(batch, wanted) for batch in bar]

        # Methods that are trained in full need no states to train on.
        self.train = steps(task.train, "training") if wanted else []
        self.held, self.old = steps(task.held, "held out"), steps(task.old, "old text")
        self.stored.check(task.train[0])

    def _states_read(self, name: str) -> set[int]:
        """Numbers of the states that a method reads."""
        if name in VARIANTS:
            return states_read(get_peft_model(copy.deepcopy(self.base), VARIANTS[name]).base_model.model.model)
        if name == PROBE:
            return {*range(self.layers, 0, -3)}
        config = PEERS[name](self.layers)
        first = self.layers if config is None else first_block(config)
        return {first} if first else set()

    def base_figures(self) -> dict:
        """Of the base itself."""
        figures = self._figures([step.output for step in self.held], [step.output for step in self.old])
        return figures | self._score(copy.deepcopy(self.base))

    @torch.no_grad()
    def _figures(self, held: list[torch.Tensor], old: list[torch.Tensor]) -> dict:
        """Held-out loss, accuracy where there are classes, and the loss on old text, for outputs of a stack."""

        def loss(outputs: list[torch.Tensor], batches: list[Batch]) -> float:
            counts = [batch.count for batch in batches]
            losses = [self.stored.loss(out, batch).item() for out, batch in zip(outputs, batches, strict=True)]
            return sum(a * b for a, b in zip(losses, counts, strict=True)) / sum(counts)

        figures = {"loss": loss(held, self.task.held), "old_loss": loss(old, self.task.old)}
        if self.task.answers:
            figures["accuracy"] = accuracy(self.task, [out @ self.stored.head[self.task.answers].T for out in held])
        return figures

    def side(self, config: QSTConfig, steps: int, rate: float, near: float = 0.0) -> dict:
        """Train QST on stored states: one step a batch. `near` is a weight of `NEAR`."""
        model = get_peft_model(copy.deepcopy(self.base), copy.deepcopy(config)).train()
        layer = model.base_model.model.model

        def loss(step: Step) -> torch.Tensor:
            output = hidden(layer, step)
            loss = self.stored.loss(output, step.batch)
            if not near:
                return loss
            prompt = step.batch.prompt
            away = (output[prompt] - step.output[prompt]).square().sum() / step.output[prompt].square().sum()
            return loss + near * away

        parameters = [p for p in model.parameters() if p.requires_grad]
        run = train(parameters, map(loss, self.train[:steps]), steps, rate)
        model.eval()
        with torch.no_grad():
            figures = self._figures(*([hidden(layer, step) for step in part] for part in (self.held, self.old)))
        return run | figures | self._score(model)

    def _score(self, model: nn.Module) -> dict:
        return self.task.score(model) if self.task.score else {}

    def head(self, steps: int, rate: float) -> dict:
        """Train the head's weight on the stored outputs of the stack."""
        weight = nn.Parameter(self.stored.head.clone())

        def loss(output: torch.Tensor, batch: Batch) -> torch.Tensor:
            labels = batch.labels[:, 1:].reshape(-1)
            chosen = labels != -100
            rows = output[:, :-1].reshape(len(labels), -1)[chosen]
            return nn.functional.cross_entropy(rows @ weight.T, labels[chosen])

        losses = (loss(step.output, step.batch) for step in self.train[:steps])
        run = train([weight], losses, steps, rate)
        before, self.stored.head = self.stored.head, weight.detach()
        try:
            return run | self._figures([step.output for step in self.held], [step.output for step in self.old])
        finally:
            self.stored.head = before

    def probe(self, penalty: float) -> dict:
        """Fit the linear probe on the training part."""
        (train, classes), (held, right) = self._features(self.train), self._features(self.held)
        center, scale = train.mean(0), train.std(0) + 1e-6
        train, held = (train - center) / scale, (held - center) / scale
        weight, bias = torch.zeros(train.shape[1], requires_grad=True), torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=100)

        def loss(rows: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
            return nn.functional.binary_cross_entropy_with_logits(rows @ weight + bias, classes)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            total = loss(train, classes) + penalty * weight.square().sum()
            total.backward()
            return total

        optimizer.step(closure)
        with torch.no_grad():
            correct = ((held @ weight + bias > 0) == right.bool()).float().mean().item()
            figures = {"parameters": len(weight) + 1, "loss": loss(held, right).item(), "accuracy": 100 * correct}
        return figures | {"seconds_per_step": 0.0, "old_loss": self.base_figures()["old_loss"]}

    @torch.no_grad()
    def _features(self, steps: list[Step]) -> tuple[torch.Tensor, torch.Tensor]:
        """For each row what the probe reads [n, features], and whether it is of the first class [n]."""
        features, classes = [], []
        for step in steps:
            read = [step.states[i].float() for i in sorted(self._states_read(PROBE))]
            states = torch.cat([state * state.square().mean(-1, keepdim=True).rsqrt() for state in read], -1)
            rows, places = (step.batch.labels != IGNORED).nonzero(as_tuple=True)
            for row, place in zip(rows, places, strict=True):
                # The first token's state has outliers and says nothing about the text.
                features.append(torch.cat([states[row, place - 1], states[row, 1:place].mean(0)]))
                classes.append(step.batch.labels[row, place] == self.task.answers[0])
        return torch.stack(features), torch.stack(classes).float()

    def peer(self, config, steps: int, rate: float) -> dict:
        """Train one of PEFT's methods: LoRA in the last blocks on the state that enters them, the others in full."""
        model, first = get_peft_model(copy.deepcopy(self.base), config).train(), first_block(config)
        bar = tqdm(range(steps), unit="step", leave=False)
        if first:
            stack = model.get_base_model().get_decoder()
            output = lambda step: last_blocks(stack, first, step.states[first].float(), step)
            losses = (self.stored.loss(output(self.train[i]), self.train[i].batch) for i in bar)
        else:
            batches = self.task.train
            losses = (model(input_ids=batches[i].ids, labels=batches[i].labels, use_cache=False).loss for i in bar)
        run = train([p for p in model.parameters() if p.requires_grad], losses, steps, rate)
        with torch.no_grad():
            figures = self._figures(*(_outputs(model, part) for part in (self.task.held, self.task.old)))
        return run | figures | self._score(model)


def first_block(config) -> int:
    """The first block that PEFT's configuration changes."""
    return min(getattr(config, "layers_to_transform", None) or [0])


def _outputs(model: nn.Module, batches: list[Batch]) -> list[torch.Tensor]:
    """What enters the head of a model for each batch."""
    model.eval()
    caught = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda head, args: caught.append(args[0]))
    for batch in batches:
        model(input_ids=batch.ids, use_cache=False)
    handle.remove()
    return caught


def train(parameters: list, losses: Iterable[torch.Tensor], steps: int, rate: float) -> dict:
    """A step of AdamW for each loss, with the rate falling to zero."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 5, steps)
    started = time.perf_counter()
    for loss in losses:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    seconds = (time.perf_counter() - started) / steps
    return {"parameters": sum(p.numel() for p in parameters), "seconds_per_step": seconds}


def one_run(bench: Bench, name: str, steps: int, rate: float, seed: int) -> dict:
    """Train a method and measure it."""
    set_seed(seed)
    if name in VARIANTS:
        return bench.side(VARIANTS[name], steps, rate, NEAR.get(name, 0.0))
    if name == PROBE:
        return bench.probe(rate)
    config = PEERS[name](bench.layers)
    return bench.head(steps, rate) if config is None else bench.peer(config, steps, rate)


def cost(base: nn.Module, batch: Batch, names: list[str], rounds: int) -> dict:
    """Seconds of one training step in the model, and the most bytes that it keeps for the backward pass, by method."""
    calls, result = {}, {}
    for name in names:
        model = copy.deepcopy(base)
        if name == "head alone":
            model.requires_grad_(False)
            head = nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False)
            head.weight.data.copy_(model.get_output_embeddings().weight)
            model.set_output_embeddings(head)
        else:
            layers = base.config.num_hidden_layers
            model = get_peft_model(model, copy.deepcopy(VARIANTS[name]) if name in VARIANTS else PEERS[name](layers))
        model.train()
        if name == "QLoRA, checkpointed":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)

        def step(model=model, optimizer=optimizer):
            model(input_ids=batch.ids, labels=batch.labels, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        with SavedForBackward(model) as saved:
            model(input_ids=batch.ids, labels=batch.labels, use_cache=False).loss.backward()
        optimizer.zero_grad()
        calls[name], result[name] = step, {"kept_bytes": saved.peak}
    clock = processor_clock if torch.get_num_threads() == 1 else time.perf_counter
    times = in_turns(calls, rounds, torch.device("cpu"), clock=clock)
    return {name: row | {"seconds": median(times[name])} for name, row in result.items()}


def _method(text: str) -> tuple[str, float | None]:
    """`METHOD` or `METHOD@RATE` of the command line."""
    name, _, rate = text.partition("@")
    if name not in VARIANTS and name not in PEERS:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join([*VARIANTS, *PEERS])}")
    return name, float(rate) if rate else None


def main(argv: list[str] | None = None) -> None:
    parser = parser_of("benchmarks.side_tuning.real_model", __doc__)
    add = parser.add_argument
    add("--model", type=model_argument, default="smollm2", help=HELP)
    add("--task", choices=TASKS, default="prose")
    add("--steps", type=int, nargs="+", default=[120])
    add("--rates", type=float, nargs="+", default=[1e-3, 2e-3])
    add("--seeds", type=int, nargs="+", default=[0])
    add("--only", nargs="+", type=_method, default=[(name, None) for name in SHOWN], metavar="METHOD[@RATE]",
        help=f"of {', '.join([*VARIANTS, *PEERS])}; with a rate of its own in place of those of --rates")  # fmt: skip
    add("--cost", action="store_true", help="measure a step of each method in the model, and train nothing")
    add("--rounds", type=int, default=3, help="timed steps of --cost")
    add("--output", type=Path, default=RESULTS / "side_tuning_real_model.json")
    args = parser.parse_args(argv)
    require_positive(parser, args, ("rounds",))
    transformers.utils.logging.set_verbosity_error()

    result = json.loads(args.output.read_text()) if args.output.exists() else {"tasks": {}}
    result |= environment(torch.device("cpu")) | {"model": Path(args.model).name}
    tokenizer, base = AutoTokenizer.from_pretrained(args.model), load_base(args.model, "cpu")
    if args.cost:
        batch = TASKS[args.task](tokenizer, 1, 0).train[0]
        result["cost"] = {**result.get("cost", {}), **cost(base, batch, [name for name, _ in args.only], args.rounds)}
        write_json(args.output, result)
    for seed in () if args.cost else args.seeds:
        bench = None
        for steps in args.steps:
            task = result["tasks"].setdefault(f"{args.task}, {steps}", {"runs": []})
            done = {(run["method"], run["rate"], run["seed"]) for run in task["runs"]}
            for name, own_rate in args.only:
                for rate in args.rates if own_rate is None else [own_rate]:
                    if (name, rate, seed) in done:
                        continue
                    # The batches of a seed are the same for every number of steps.
                    task_of = TASKS[args.task]
                    bench = bench or Bench(base, task_of(tokenizer, max(args.steps), seed), dict(args.only))
                    if "base" not in task:
                        task["base"] = bench.base_figures()
                    run = {"method": name, "rate": rate, "seed": seed} | one_run(bench, name, steps, rate, seed)
                    task["runs"].append(run)
                    print(
                        {k: round(v, 4) if isinstance(v, float) else v for k, v in run.items()} | {"steps": steps},
                        flush=True,
                    )
                    write_json(args.output, result | {"arguments": as_json(vars(args))})
    print(table(result))
    picture(result, args.output.with_suffix(".png"))
    print(f"Wrote {args.output}")


if __name__ == "__main__":
    main()
