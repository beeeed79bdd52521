"""The methods of the pruning benchmark: smaller models of one size, by method, and the same recovery for all of them."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.compression.llm import Text
from benchmarks.compression.methods import parameters
from benchmarks.pruning.cost import layout_of
from benchmarks.pruning.slicing import rotations, sliced, width_on_budget
from examples.corpus import BlockDataset
from hf_qst import DISPCallback, DISPConfig
from hf_qst.pruning import SELECTIONS, best_channels, masks_by_layer, prune_blocks, prune_model, widths_on_budget

# The seven linear layers of a Llama block, the same for every method.
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA_RANK = 16
# Twice the paper's, for hundreds of steps in place of its ten thousand: the gates are decided by the end.
LEARNING_RATE = 2e-3
ROUNDED = 64


@dataclass(frozen=True)
class Schedule:
    """Steps of a training on `rows` [n, length], and the rows in a batch."""

    rows: torch.Tensor
    steps: int
    batch: int


@dataclass
class Bench:
    """The inputs of every method: the dense model, the text, how DISP learns and how all models recover."""

    dense: nn.Module
    text: Text
    learning: Schedule
    recovery: Schedule
    recovery_rate: float

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
    """

    label: str
    make: Callable[[Bench, float, int], Iterator[tuple[str, nn.Module, dict]]]
    baseline: bool = False
    seeds: bool = False
    ablation: bool = False


def train(model: nn.Module, schedule: Schedule, seed: int, callbacks: list[TrainerCallback] = (), **arguments) -> None:
    """Train what is trainable with the ordinary Trainer."""
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
        Trainer(model, settings, train_dataset=BlockDataset(schedule.rows), callbacks=[*callbacks]).train()


def _by_scores(name: str, method: str, **settings):
    def make(bench: Bench, keep: float, seed: int):
        small = prune_model(
            copy.deepcopy(bench.dense), method, keep, calibration_data=bench.text.calibration, seed=seed, **settings
        )
        yield name, small, {}

    return make


def _sliced(bench: Bench, keep: float, seed: int):
    width = width_on_budget(bench.dense, bench.allowed(keep))
    small = sliced(bench.dense, rotations(bench.dense, bench.text.calibration), width)
    yield "slicegpt", small, {"width": width}


def _learned(name: str, rate: float = LEARNING_RATE, rounded: str | None = None, **settings):
    """DISP; `rounded` names a second row of the first seed, of the same logits at widths in multiples of `ROUNDED`."""

    def make(bench: Bench, keep: float, seed: int):
        config = DISPConfig(task_type="CAUSAL_LM", keep_ratio=keep, seed=seed, **settings)
        model = get_peft_model(copy.deepcopy(bench.dense), config)
        callback = DISPCallback(progress=False)
        # The paper's recipe, but for the rate.
        recipe = {"weight_decay": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
        train(model, bench.learning, seed, [callback], learning_rate=rate, **recipe)
        network = model.base_model.disp_layer.active_network()
        for row, multiple in ((name, 1), (rounded if seed == 0 else None, ROUNDED)):
            if row is not None:
                small, widths = exported(bench.dense, network, multiple)
                settled = callback.report.threshold_ratio
                yield row, small, {"steps": bench.learning.steps, "widths": widths, "threshold_ratio": settled}

    return make


@torch.no_grad()
def exported(dense: nn.Module, network, multiple: int) -> tuple[nn.Module, list[list[int]]]:
    """A copy of the dense model cut to what a learned network keeps at widths of this multiple, and the widths [layers, 5]."""
    logits = network.logits()
    widths = widths_on_budget(logits, network.plan, network.budget, multiple)
    masks = masks_by_layer(network.plan, best_channels(logits, widths))
    small = prune_blocks(copy.deepcopy(dense), masks)
    return small, [[int(mask[name].sum()) for name in SELECTIONS] for mask in masks]


METHODS = {
    "random": Method("random", _by_scores("random", "random"), True, True),
    "magnitude": Method("magnitude", _by_scores("magnitude", "magnitude"), True),
    "wanda": Method("Wanda-style, uniform", _by_scores("wanda", "wanda"), True),
    "flap": Method("FLAP-style, uniform", _by_scores("flap", "flap"), True),
    "flap-global": Method("FLAP-style, global", _by_scores("flap-global", "flap", allocation="global"), True),
    "flap-middle": Method(
        "FLAP-style, global, MLP middle only",
        _by_scores("flap-middle", "flap", allocation="global", selections=["mlp_middle"]),
        True,
    ),
    "slicegpt": Method("SliceGPT-style", _sliced, True),
    "disp": Method("DISP", _learned("disp", rounded="disp-64"), seeds=True),
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
