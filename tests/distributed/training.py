"""A short training of each method, the same for any number of processes, through Trainer's own arguments."""

from __future__ import annotations

import math
import os

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from hf_qst import DISPCallback
from tests.architectures import token_batch
from tests.conformance.methods import LINES
from tests.toy_data import token_dataset
from tests.trainers import plain_trainer

METHODS = ["qst", "qst_tail", "disp", "mixed_rank", "mixed_rank_in_place"]
FSDP2 = {"fsdp": True, "fsdp_config": {"version": 2}}
ROWS, STEPS, SAVED = 8, 6, 3


def let_a_cpu_shard() -> None:
    """accelerate shards on accelerators alone: on a CPU it trains with DDP, whatever was asked for, and says nothing.

    The rest of its code does not look at the device, so this takes a CPU for one of them.
    """
    original = AcceleratorState.__init__

    def as_on_accelerators(self, *args, **kwargs):
        if PartialState().distributed_type == DistributedType.MULTI_CPU:
            PartialState().distributed_type = DistributedType.MULTI_GPU
        original(self, *args, **kwargs)

    AcceleratorState.__init__ = as_on_accelerators


def make(name: str, base=None):
    """The model of a method with the same weights in every process."""
    torch.manual_seed(0)
    data = {}
    if name == "disp":  # a sharded model cannot be scored when training starts
        ids = [token_batch(4, 16, seed=seed) for seed in range(2)]
        data = {"calibration_data": [{"input_ids": batch, "labels": batch} for batch in ids]}
    return LINES[name].model(base, **data)


class SameDraw(DISPCallback):
    """All processes draw the gates that one would draw."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        super().on_step_begin(args, state, control, model=model, **kwargs)
        network, step = self._layer.active_network(), state.global_step

        def sample():
            with torch.random.fork_rng():
                torch.manual_seed(step)
                return type(network).sample(network)

        network.sample = sample


def trainer(name: str, model, directory, **settings):
    """A trainer whose updates see the same rows with any number of processes, on a CPU."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    defaults = {
        "per_device_train_batch_size": ROWS // processes,
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": SAVED,
        "learning_rate": 1e-2,
        "ddp_find_unused_parameters": False,
        "ddp_backend": "gloo" if processes > 1 else None,
    }
    run = plain_trainer(model, directory, token_dataset(ROWS * STEPS), **{**defaults, **settings})
    if name == "disp":
        run.add_callback(SameDraw(progress=False))
    return run


def losses_of(run) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def divided(model) -> list[bool]:
    """For each parameter whether this process holds its part alone: a half where there are two."""
    parts = dist.get_world_size()
    return [
        isinstance(p, DTensor) and p.to_local().shape[0] <= math.ceil(p.shape[0] / parts) for p in model.parameters()
    ]


def train_all(directory, kind: str, names=METHODS, resume_from=None, fsdp: bool = False, settings=None) -> dict:
    """Train each method; what this process saw of it: losses, which parameters were divided, and what wrapped the model.

    Args:
        kind: name of the folder of the runs in `directory`.
        resume_from: kind of an earlier run whose checkpoint is gone on with.
        fsdp: let accelerate shard on a CPU.
    """
    if fsdp:
        let_a_cpu_shard()
    found = {}
    for name in names:
        run = trainer(name, make(name), directory / kind / name, **(settings or {}))
        checkpoint = None if resume_from is None else str(directory / resume_from / name / f"checkpoint-{SAVED}")
        run.train(resume_from_checkpoint=checkpoint)
        found[name] = {
            "losses": losses_of(run)[-STEPS:],
            "divided": divided(run.model),
            "wrapper": type(run.model_wrapped).__name__,
        }
    return found
