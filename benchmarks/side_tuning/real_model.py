"""Side tuning and its peers on a real pretrained model and real tasks: held-out loss, accuracy, forgetting, cost.

    python -m benchmarks.side_tuning.real_model --model smollm2 --task prose --steps 40 120
    python -m benchmarks.side_tuning.real_model --task sentiment --steps 150 --seeds 0 1 2 --only default QLoRA --sweep
    python -m benchmarks.side_tuning.real_model --device cuda --output gpu.json --sweep
    python -m benchmarks.side_tuning.real_model --cost           # a step of each in the model: seconds, kept bytes
    python -m benchmarks.side_tuning.real_model --output all.json --merge one.json other.json

QST and LoRA in the last blocks run on stored hidden states of the base (`benchmarks.side_tuning.stored_states`), with the
loss that they have in the model, which the script checks for QST; the other peers are trained in full. Every method gets
the same batches and every rate of `--rates`, and is listed at the best. With `--sweep` the first seed at the first number
of steps tries more rates until the best lies between two others, and all other runs get that rate. The best is that of
the lowest loss on the validation batches, or on the held-out ones where a run is from before there were any.

Results are added to `benchmarks/results/side_tuning_real_model.json`, run by run; runs that are in it are not repeated.
The picture beside it shows the loss on prose against seconds and kept bytes. Everything is computed in float32.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import median

import torch
import transformers
from peft import LoraConfig, ShadowConfig, get_peft_model
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer, get_linear_schedule_with_warmup, set_seed

from benchmarks.common.command_line import as_json, parser_of, require_device, require_positive
from benchmarks.common.measure import RESULTS, environment, synchronize, write_json
from benchmarks.common.merging import united
from benchmarks.common.timing import in_turns, processor_clock
from benchmarks.side_tuning.real_model_report import SAME_LOSS, best_rate, next_rate, picture, table
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
    "tail 10 of rank 64": _side(tail_layers=10, tail_rank=64),
    "tail 20": _side(tail_layers=20),
    "tail 29": _side(tail_layers=29),
    "no readout": _side(readout_rank=0),
    "no input norm": _side(downsample_input_norm=False),
    "all blocks, r=16": _side(r=16, side_every=1),
    "readout rank 32": _side(readout_rank=32),
    "readout every block": _side(readout_every=1),
    "r=3": _side(r=3),
    "principal": _side(downsample="principal"),
    "side block every 3": _side(side_every=3),
    "readout rank 64 of every block": _side(readout_rank=64, readout_every=1),
    "alpha of each channel": _side(mix_shape="vector"),
    "large": _side(r=4, side_every=3, readout_rank=64, readout_every=1, mix_shape="vector"),
    "readout at half the rate": _side(),
    "readout at twice the rate": _side(),
    "readout by the gradient": _side(),
    "default, near the base": _side(),
}
"""Configurations of QST; each differs in one thing from the default, or is the paper's, or is named `before` or `large`."""
TRAINED = {
    "readout at half the rate": {"readout_rate": 0.5},
    "readout at twice the rate": {"readout_rate": 2.0},
    "readout by the gradient": {"gradient_batches": 8},
    "default, near the base": {"near": 10.0},
}
"""Of variants: how they are trained, arguments of `Bench.side`."""
PROBE = "linear probe"
PEERS = {
    "QLoRA": lambda layers: _lora(),
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
PENALTIES, HEAD_RATES = (0.05, 0.1, 0.2), (5e-5, 1e-4, 2e-4)
SHOWN = ("paper", "default", "tail 2", "tail 4", "tail 8", *(name for name in PEERS if name != PROBE), *SAME_LOSS)
NAMES = [*VARIANTS, *PEERS, *SAME_LOSS]


class Bench:
    """A base, a task, and the states of the base for its batches that the methods called `names` read.

    `stored` has the base's states of tasks before this one.
    """

    def __init__(self, base: nn.Module, task: Task, names: Iterable[str], stored: StoredBase | None = None):
        self.base, self.task = base, task
        self.layers = base.config.num_hidden_layers
        self.stored = StoredBase(base) if stored is None else stored
        wanted = set().union(*map(self._states_read, names))

        def steps(batches: list[Batch], name: str) -> list[Step]:
            bar = tqdm(batches, desc=f"states of the base, {name}", leave=False)
            return [self.stored.step(batch, wanted) for batch in bar]

        # Methods that are trained in full need no states to train on.
        self.train = steps(task.train, "training") if wanted else []
        self.held, self.old = steps(task.held, "held out"), steps(task.old, "old text")
        self.validation = steps(task.validation, "validation")
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
        return self._figures(lambda step: step.output) | self.score(copy.deepcopy(self.base))

    @torch.no_grad()
    def _figures(self, output: Callable[[Step], torch.Tensor]) -> dict:
        """Held-out loss, accuracy where there are classes, and the losses on old text and for validation, for outputs of a
        stack."""

        def loss(outputs: Iterable[torch.Tensor], batches: list[Batch]) -> float:
            counts = [batch.count for batch in batches]
            losses = [self.stored.loss(out, batch).item() for out, batch in zip(outputs, batches, strict=True)]
            return sum(a * b for a, b in zip(losses, counts, strict=True)) / sum(counts)

        held = list(map(output, self.held))
        figures = {"loss": loss(held, self.task.held), "old_loss": loss(map(output, self.old), self.task.old)}
        if self.validation:
            figures["validation_loss"] = loss(map(output, self.validation), self.task.validation)
        if self.task.answers:
            figures["accuracy"] = accuracy(self.task, [out @ self.stored.head[self.task.answers].T for out in held])
        return figures

    def side(
        self,
        config: QSTConfig,
        steps: int,
        rate: float,
        *,
        readout_rate: float = 1.0,
        gradient_batches: int = 0,
        near: float = 0.0,
    ) -> tuple[dict, nn.Module]:
        """Train QST on stored states: one step a batch.

        Args:
            readout_rate: the readout's learning rate, relative to that of the rest.
            gradient_batches: the readout starts with the directions of the loss gradient on so many batches.
            near: weight of the squared distance of the output from the base's where there is no label, relative to it.
        """
        model = get_peft_model(copy.deepcopy(self.base), copy.deepcopy(config)).train()
        layer = model.base_model.model.model
        if gradient_batches:
            self.stored.direct_readout(layer, self.train[:gradient_batches])

        def loss(step: Step) -> torch.Tensor:
            output = hidden(layer, step)
            loss = self.stored.loss(output, step.batch)
            if not near:
                return loss
            prompt = step.batch.prompt
            away = (output[prompt] - step.output[prompt]).square().sum() / step.output[prompt].square().sum()
            return loss + near * away

        groups = [{"params": [], "lr": rate}, {"params": [], "lr": readout_rate * rate}]
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups[".readout." in name]["params"].append(parameter)
        run = train(groups, map(loss, self.train[:steps]), steps, rate)
        model.eval()
        return run | self._figures(lambda step: hidden(layer, step)), model

    def score(self, model: nn.Module) -> dict:
        """The task's further figures of a model."""
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
        run = train([{"params": [weight]}], losses, steps, rate)
        before, self.stored.head = self.stored.head, weight.detach()
        try:
            return run | self._figures(lambda step: step.output)
        finally:
            self.stored.head = before

    def probe(self, penalty: float) -> dict:
        """Fit the linear probe on the training part."""
        (train, classes), (held, right) = self._features(self.train), self._features(self.held)
        center, scale = train.mean(0), train.std(0) + 1e-6
        train, held = (train - center) / scale, (held - center) / scale
        weight, bias = (torch.zeros(size, requires_grad=True, device=train.device) for size in (train.shape[1], 1))
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
            if self.validation:
                rows, classes = self._features(self.validation)
                figures["validation_loss"] = loss((rows - center) / scale, classes).item()
            old_loss = self._figures(lambda step: step.output)["old_loss"]
        return figures | {"seconds_per_step": 0.0, "old_loss": old_loss}

    @torch.no_grad()
    def _features(self, steps: list[Step]) -> tuple[torch.Tensor, torch.Tensor]:
        """For each row what the probe reads [n, features], and whether it is of the first class [n]."""
        features, classes, numbers = [], [], sorted(self._states_read(PROBE))
        for step in steps:
            states = torch.cat([step.normal_state(i) for i in numbers], -1)
            for row, place in (step.batch.labels != IGNORED).nonzero().tolist():
                # The first token's state has outliers and says nothing about the text.
                features.append(torch.cat([states[row, place - 1], states[row, 1:place].mean(0)]))
                classes.append(step.batch.labels[row, place] == self.task.answers[0])
        return torch.stack(features), torch.stack(classes).float()

    def peer(self, config, steps: int, rate: float) -> tuple[dict, nn.Module]:
        """Train one of PEFT's methods: LoRA in the last blocks on the state that enters them, the others in full."""
        model, first = get_peft_model(copy.deepcopy(self.base), config).train(), first_block(config)
        bar = tqdm(range(steps), unit="step", leave=False)
        if first:
            stack = model.get_base_model().get_decoder()
            output = lambda step: last_blocks(stack, first, step.state(first), step)
            losses = (self.stored.loss(output(self.train[i]), self.train[i].batch) for i in bar)
        else:
            output, batches = partial(_output, model), self.task.train
            losses = (model(input_ids=batches[i].ids, labels=batches[i].labels, use_cache=False).loss for i in bar)
        run = train([{"params": [p for p in model.parameters() if p.requires_grad]}], losses, steps, rate)
        model.eval()
        return run | self._figures(output), model


def first_block(config) -> int:
    """The first block that PEFT's configuration changes."""
    return min(getattr(config, "layers_to_transform", None) or [0])


def _output(model: nn.Module, step: Step) -> torch.Tensor:
    """What enters the head of a model for a batch."""
    caught = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda head, args: caught.append(args[0]))
    model(input_ids=step.batch.ids, use_cache=False)
    handle.remove()
    return caught[0]


def train(groups: list[dict], losses: Iterable[torch.Tensor], steps: int, rate: float) -> dict:
    """A step of AdamW for each loss, with the rate falling to zero; `groups` are those of a torch optimiser."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    device = parameters[0].device
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.0, fused=device.type == "cuda")
    schedule = get_linear_schedule_with_warmup(optimizer, 5, steps)
    started = time.perf_counter()
    for loss in losses:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    synchronize(device)
    seconds = (time.perf_counter() - started) / steps
    return {"parameters": sum(p.numel() for p in parameters), "seconds_per_step": seconds}


def one_run(bench: Bench, name: str, steps: int, rate: float, seed: int, scored: bool = True) -> dict:
    """Train a method and measure it, with the task's score if `scored`."""
    set_seed(seed)
    if name == PROBE:
        return bench.probe(rate)
    if name in VARIANTS:
        run, model = bench.side(VARIANTS[name], steps, rate, **TRAINED.get(name, {}))
    elif (config := PEERS[name](bench.layers)) is None:
        return bench.head(steps, rate)
    else:
        run, model = bench.peer(config, steps, rate)
    return run | bench.score(model) if scored else run


class Runs:
    """The runs of one task in a result file: makes those that are missing, and writes the file after each.

    Args:
        args: of the command line.
        result: what is in the file.
        base, tokenizer: the model.
        names: of the methods.
    """

    def __init__(self, args: argparse.Namespace, result: dict, base: nn.Module, tokenizer, names: Iterable[str]):
        self.args, self.result, self.base, self.tokenizer, self.names = args, result, base, tokenizer, list(names)
        self.stored, self.bench, self.seed = StoredBase(base), None, None

    def of(self, steps: int) -> list[dict]:
        """Those with this number of steps."""
        return self.result["tasks"].setdefault(f"{self.args.task}, {steps}", {"runs": []})["runs"]

    def make(self, name: str, steps: int, rate: float, seed: int, scored: bool = True) -> None:
        """Add a run, if it is not there with its score."""
        known = {"method": name, "rate": rate, "seed": seed}
        same = [run for run in self.of(steps) if run.items() >= known.items()]
        if same and (not scored or not self._has_score(name) or "solved" in same[0]):
            return
        bench, task = self._bench(seed), self.result["tasks"][f"{self.args.task}, {steps}"]
        if "base" not in task:
            task["base"] = bench.base_figures()
        run = known | one_run(bench, name, steps, rate, seed, scored)
        task["runs"] = [other for other in task["runs"] if other not in same] + [run]
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in run.items()} | {"steps": steps}, flush=True)
        write_json(self.args.output, self.result | {"arguments": as_json(vars(self.args))})

    def _has_score(self, name: str) -> bool:
        return self.args.task == "functions" and name not in (PROBE, "head alone")

    def _bench(self, seed: int) -> Bench:
        if seed != self.seed:
            # The batches of a seed are the same for every number of steps.
            task = TASKS[self.args.task](self.tokenizer, max(self.args.steps), seed).to(self.args.device)
            self.bench, self.seed = Bench(self.base, task, self.names, self.stored), seed
        return self.bench

    def sweep(self, name: str, rates: Iterable[float]) -> float:
        """The best rate with the first number of steps and the first seed: at first of `rates`, then twice or half the best,
        until that lies between two others. Only the best is scored."""
        steps, seed, wanted = self.args.steps[0], self.args.seeds[0], list(rates)
        while wanted:
            for rate in wanted:
                self.make(name, steps, rate, seed, scored=False)
            runs = [run for run in self.of(steps) if run["method"] == name and run["seed"] == seed]
            wanted = next_rate(runs)
        self.make(name, steps, best_rate(runs), seed)
        return best_rate(runs)


def cost(base: nn.Module, batch: Batch, names: list[str], rounds: int) -> dict:
    """Seconds of one training step in the model, and the most bytes that it keeps for the backward pass, by method."""
    calls, result, device = {}, {}, batch.ids.device
    for name in names:
        model = copy.deepcopy(base)
        if name == "head alone":
            model.requires_grad_(False)
            before = model.get_output_embeddings().weight
            head = nn.Linear(before.shape[1], before.shape[0], bias=False, device=before.device)
            head.weight.data.copy_(before)
            model.set_output_embeddings(head)
        else:
            layers, of = base.config.num_hidden_layers, SAME_LOSS.get(name, name)
            model = get_peft_model(model, copy.deepcopy(VARIANTS[of]) if of in VARIANTS else PEERS[of](layers))
        model.train()
        if name in SAME_LOSS:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=device.type == "cuda")

        def step(model=model, optimizer=optimizer):
            model(input_ids=batch.ids, labels=batch.labels, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        with SavedForBackward(model) as saved:
            model(input_ids=batch.ids, labels=batch.labels, use_cache=False).loss.backward()
        optimizer.zero_grad()
        calls[name], result[name] = step, {"kept_bytes": saved.peak}
    clock = processor_clock if device.type == "cpu" else time.perf_counter
    times = in_turns(calls, rounds, device, clock=clock)
    return {name: row | {"seconds": median(times[name])} for name, row in result.items()}


def _method(text: str) -> tuple[str, float | None]:
    """`METHOD` or `METHOD@RATE` of the command line."""
    name, _, rate = text.partition("@")
    if name not in NAMES:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(NAMES)}")
    return name, float(rate) if rate else None


def main(argv: list[str] | None = None) -> None:
    parser = parser_of("benchmarks.side_tuning.real_model", __doc__)
    add = parser.add_argument
    add("--model", type=model_argument, default="smollm2", help=HELP)
    add("--task", choices=TASKS, default="prose")
    add("--steps", type=int, nargs="+", default=[120])
    add("--rates", type=float, nargs="+", default=[1e-3, 2e-3],
        help=f"not for the head, which has {HEAD_RATES}, and the probe, whose penalties are {PENALTIES}")  # fmt: skip
    add("--sweep", action="store_true",
        help="try --rates and more with the first seed and number of steps, and give the other runs the best")  # fmt: skip
    add("--seeds", type=int, nargs="+", default=[0])
    add("--only", nargs="+", type=_method, default=[(name, None) for name in SHOWN], metavar="METHOD[@RATE]",
        help=f"of {', '.join(NAMES)}; with a rate of its own in place of those of --rates")  # fmt: skip
    add("--cost", action="store_true", help="measure a step of each method in the model, and train nothing")
    add("--rounds", type=int, default=3, help="timed steps of --cost")
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add("--merge", type=Path, nargs="+", default=[], metavar="FILE",
        help="add the runs of these result files to --output, and train nothing")  # fmt: skip
    add("--output", type=Path, default=RESULTS / "side_tuning_real_model.json")
    args = parser.parse_args(argv)
    require_positive(parser, args, ("rounds",))
    require_device(parser, args)
    transformers.utils.logging.set_verbosity_error()

    result = json.loads(args.output.read_text()) if args.output.exists() else {"tasks": {}}
    if args.merge:
        result = united([result, *(json.loads(file.read_text()) for file in args.merge)])
        write_json(args.output, result)
    else:
        measure(args, result)
    print(table(result))
    picture(result, args.output.with_suffix(".png"))
    print(f"Wrote {args.output}")


def measure(args: argparse.Namespace, result: dict) -> None:
    """Make what is missing in `result`."""
    result |= environment(torch.device(args.device)) | {"model": Path(args.model).name}
    tokenizer, base = AutoTokenizer.from_pretrained(args.model), load_base(args.model, args.device, torch.float32)
    if args.cost:
        batch = TASKS[args.task](tokenizer, 1, 0).train[0].to(args.device)
        result["cost"] = {**result.get("cost", {}), **cost(base, batch, [name for name, _ in args.only], args.rounds)}
        write_json(args.output, result)
        return
    rates: dict[str, list[float]] = {}
    for name, rate in args.only:
        if name not in SAME_LOSS:
            own = {PROBE: PENALTIES, "head alone": HEAD_RATES}.get(name, args.rates)
            rates.setdefault(name, []).extend(own if rate is None else [rate])
    runs, first = Runs(args, result, base, tokenizer, rates), (args.seeds[0], args.steps[0])
    for seed in args.seeds:
        for steps in args.steps:
            for name, tried in rates.items():
                best = [runs.sweep(name, tried)] if args.sweep else tried
                for rate in () if args.sweep and (seed, steps) == first else best:
                    runs.make(name, steps, rate, seed)


if __name__ == "__main__":
    main()
