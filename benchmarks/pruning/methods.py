"""The methods of the pruning benchmark: smaller models of one size, by method, and the same recovery for all of them."""

from __future__ import annotations

import copy
import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.common.measure import synchronize
from benchmarks.compression.llm import Text
from benchmarks.compression.methods import parameters
from benchmarks.pruning.cost import layout_of
from benchmarks.pruning.shortening import block_influences, shortened
from benchmarks.pruning.slicing import rotations, sliced, width_on_budget
from examples.corpus import BlockDataset
from hf_qst import DISPCallback, DISPConfig
from hf_qst.base_model import find_decoder_stack
from hf_qst.pruning import (
    PRUNING_METHODS,
    SELECTIONS,
    PruningTask,
    SelectionMap,
    best_channels,
    comparable_scores,
    masks_by_layer,
    prune_blocks,
    use_kernels,
    widths_on_budget,
)

# The seven linear layers of a Llama block, the same for every method.
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA_RANK = 16
# Twice the paper's, for hundreds of steps in place of its ten thousand: the gates are decided by the end.
LEARNING_RATE = 2e-3
ROUNDED = 64
EVALUATIONS = 2


@dataclass(frozen=True)
class Schedule:
    """Steps of a training on `rows` [n, length], the rows in a batch, and other rows to evaluate on meanwhile."""

    rows: torch.Tensor
    steps: int
    batch: int
    validation: torch.Tensor | None = None


@dataclass
class Bench:
    """The inputs of every method: the dense model, the text, how DISP learns and how all models recover."""

    dense: nn.Module
    text: Text
    learning: Schedule
    recovery: Schedule
    recovery_rate: float
    rounded: bool = True
    # Made once for all parts kept: what a method finds out from the calibration data, and the seconds that took.
    found: dict = field(default_factory=dict)

    def once(self, name: tuple, make: Callable[[], object]) -> tuple[object, float]:
        """The result of `make` and its seconds; a second call under the same name gives those of the first."""
        if name not in self.found:
            start = time.perf_counter()
            made = make()
            synchronize(next(self.dense.parameters()).device)
            self.found[name] = made, time.perf_counter() - start
        return self.found[name]

    @functools.cached_property
    def task(self) -> PruningTask:
        """What methods by scores are given; its statistics are collected once."""
        return PruningTask(self.dense, find_decoder_stack(self.dense), layout_of(self.dense), self.text.calibration)

    def allowed(self, keep: float) -> int:
        """Parameters of a whole model at this part of the blocks' matrices."""
        total = layout_of(self.dense).total
        return int(keep * total) + parameters(self.dense) - total


@dataclass(frozen=True)
class Method:
    """One row of the tables.

    Args:
        label: as printed.
        make: (bench, keep, seed) -> the models by the names of their rows, each with facts about it.
        baseline: whether it is somebody else's.
        seeds: whether another seed gives another model.
        ablation: whether it is a variant of ours.
        times: how many times the steps of the schedule it learns.
    """

    label: str
    make: Callable[[Bench, float, int], Iterator[tuple[str, nn.Module, dict]]]
    baseline: bool = False
    seeds: bool = False
    ablation: bool = False
    times: int = 1


def train(model: nn.Module, schedule: Schedule, seed: int, callbacks: list[TrainerCallback] = (), **arguments) -> None:
    """Train what is trainable with the ordinary Trainer; where the schedule has rows for it, with evaluation."""
    if schedule.validation is not None:
        every = max(1, schedule.steps // EVALUATIONS)
        arguments |= {"eval_strategy": "steps", "eval_steps": every, "per_device_eval_batch_size": schedule.batch}
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=schedule.steps,
            per_device_train_batch_size=schedule.batch,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            use_cpu=next(model.parameters()).device.type == "cpu",
            seed=seed,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            **arguments,
        )
        validation = None if schedule.validation is None else BlockDataset(schedule.validation)
        Trainer(
            model,
            settings,
            train_dataset=BlockDataset(schedule.rows),
            eval_dataset=validation,
            callbacks=[*callbacks],
        ).train()


def _by_scores(name: str, method: str, allocation: str | None = None, selections: Sequence[str] = SELECTIONS):
    def make(bench: Bench, keep: float, seed: int):
        task = dataclasses.replace(bench.task, seed=seed) if method == "random" else bench.task
        scores, seconds = bench.once((method, seed), lambda: PRUNING_METHODS[method].score(task))
        plan = SelectionMap.of(task.layout, selections)
        owned = comparable_scores(method, scores, plan, allocation)
        widths = widths_on_budget(owned, plan, int(keep * task.layout.total))
        small = prune_blocks(copy.deepcopy(bench.dense), masks_by_layer(plan, best_channels(owned, widths)))
        yield name, small, {"learning_seconds": seconds}

    return make


def _sliced(bench: Bench, keep: float, seed: int):
    width = width_on_budget(bench.dense, bench.allowed(keep))
    bases, seconds = bench.once(("rotations",), lambda: rotations(bench.dense, bench.text.calibration))
    yield "slicegpt", sliced(bench.dense, bases, width), {"width": width, "learning_seconds": seconds}


def _shortened(bench: Bench, keep: float, seed: int):
    influences, seconds = bench.once(("influences",), lambda: block_influences(bench.dense, bench.text.calibration))
    yield "shortgpt", shortened(bench.dense, influences, keep), {"learning_seconds": seconds}


def _learned(name: str, rate: float = LEARNING_RATE, rounded: str | None = None, times: int = 1, **settings):
    """DISP; `rounded` names a second row of the first seed, of the same logits at widths in multiples of `ROUNDED`."""

    def make(bench: Bench, keep: float, seed: int):
        config = DISPConfig(task_type="CAUSAL_LM", keep_ratio=keep, width_multiple=1, seed=seed, **settings)
        model = get_peft_model(copy.deepcopy(bench.dense), config)
        callback = DISPCallback(progress=False)
        schedule = dataclasses.replace(bench.learning, steps=times * bench.learning.steps)
        # The paper's recipe, but for the rate.
        recipe = {"weight_decay": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
        start = time.perf_counter()
        train(model, schedule, seed, [callback], learning_rate=rate, **recipe)
        seconds = time.perf_counter() - start
        network = model.base_model.disp_layer.active_network()
        for row, multiple in ((name, 1), (rounded if bench.rounded and seed == 0 else None, ROUNDED)):
            if row is not None:
                small, widths = exported(bench.dense, network, multiple)
                settled = callback.report.threshold_ratio
                facts = {"steps": schedule.steps, "widths": widths, "threshold_ratio": settled}
                yield row, small, facts | {"learning_seconds": seconds}

    return make


@torch.no_grad()
def exported(dense: nn.Module, network, multiple: int) -> tuple[nn.Module, list[list[int]]]:
    """A copy of the dense model cut to what a learned network keeps at widths of this multiple, and the widths [layers, 5]."""
    logits = network.logits()
    widths = widths_on_budget(logits, network.plan, network.budget, multiple)
    masks = masks_by_layer(network.plan, best_channels(logits, widths))
    small = prune_blocks(copy.deepcopy(dense), masks)
    return small, [[int(mask[name].sum()) for name in SELECTIONS] for mask in masks]


MIDDLE = ["mlp_middle"]
LONGER = 3
METHODS = {
    "random": Method("random", _by_scores("random", "random"), True, True),
    "magnitude": Method("magnitude", _by_scores("magnitude", "magnitude"), True),
    "wanda": Method("Wanda-style, uniform", _by_scores("wanda", "wanda"), True),
    "flap": Method("FLAP-style, uniform", _by_scores("flap", "flap"), True),
    "flap-global": Method("FLAP-style, global", _by_scores("flap-global", "flap", "global"), True),
    "flap-middle": Method(
        "FLAP-style, global, MLP middle only", _by_scores("flap-middle", "flap", "global", MIDDLE), True
    ),
    "llm-pruner": Method("LLM-Pruner-style, uniform", _by_scores("llm-pruner", "taylor"), True),
    "llm-pruner-middle": Method(
        "LLM-Pruner-style, MLP middle only", _by_scores("llm-pruner-middle", "taylor", "uniform", MIDDLE), True
    ),
    "slicegpt": Method("SliceGPT-style", _sliced, True),
    "shortgpt": Method("ShortGPT-style", _shortened, True),
    "fisher": Method("DISP's start (Fisher scores), not learned", _by_scores("fisher", "fisher"), ablation=True),
    "disp": Method("DISP", _learned("disp", rounded="disp-64"), seeds=True),
    "disp-long": Method(
        f"DISP, {LONGER} times the steps", _learned("disp-long", times=LONGER), ablation=True, times=LONGER
    ),
    "disp-paper": Method("DISP, the paper's start", _learned("disp-paper", start_scores="none"), ablation=True),
    "disp-no-network": Method(
        "DISP, no hypernetwork", _learned("disp-no-network", 10 * LEARNING_RATE, hypernetwork="none"), ablation=True
    ),
    "disp-constrained": Method("DISP, constrained", _learned("disp-constrained", constraint="model"), ablation=True),
}
DEFAULT = "disp"
LABELS = {name: method.label for name, method in METHODS.items()} | {"disp-64": "DISP, widths in 64s"}
BASELINES = [name for name, method in METHODS.items() if method.baseline]


def made(bench: Bench, method: str, keep: float, seed: int) -> Iterator[tuple[dict, nn.Module]]:
    """The rows of a method, each with its model: parameters counted from the tensors, how far below the budget."""
    torch.manual_seed(seed)
    start = time.perf_counter()
    for name, model, facts in METHODS[method].make(bench, keep, seed):
        # Widths differ from block to block, and a GPU's kernels would be compiled for each of them.
        use_kernels(model, enabled=False)
        count, allowed = parameters(model), bench.allowed(keep)
        row = {"method": name, "keep": keep, "seed": seed, "parameters": count, "budget": allowed}
        row |= {"below_budget": (allowed - count) / allowed, "seconds": time.perf_counter() - start, **facts}
        yield row, model.eval()


def recovered(bench: Bench, model: nn.Module, seed: int) -> nn.Module:
    """The model with LoRA adapters trained on the calibration text's kind; the model's own weights stay."""
    torch.manual_seed(seed)
    sizes = {"r": LORA_RANK, "lora_alpha": 2 * LORA_RANK, "target_modules": LORA_TARGETS}
    tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **sizes))
    warmup = max(1, bench.recovery.steps // 20)
    train(tuned, bench.recovery, seed, learning_rate=bench.recovery_rate, warmup_steps=warmup)
    return tuned.eval()
