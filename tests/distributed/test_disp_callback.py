"""DISP's callback with weights that FSDP2 has divided: what it refuses, and what all processes decide together."""

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from hf_qst import DISPCallback
from tests.conformance.methods import LINES
from tests.distributed.processes import in_processes
from tests.distributed.training import FSDP2, let_a_cpu_shard, make
from tests.toy_data import token_dataset
from tests.trainers import plain_trainer


class Spoiled(TrainerCallback):
    """One process's part of one gradient is NaN in the second step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1 and dist.get_rank() == 1:
            parameter = next(p for p in model.parameters() if p.requires_grad and p.grad.to_local().numel())
            parameter.grad.to_local().fill_(torch.nan)


def run_of(model, place, *callbacks):
    run = plain_trainer(
        model, place, token_dataset(32), per_device_train_batch_size=4, max_steps=4, ddp_backend="gloo", **FSDP2
    )
    for callback in callbacks:
        run.add_callback(callback)
    return run


def message(run) -> str:
    try:
        run.train()
    except ValueError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def under_fsdp(place) -> dict:
    let_a_cpu_shard()
    found = {
        "start": message(run_of(LINES["disp"].model(), place, DISPCallback(progress=False))),
        "export": message(run_of(make("disp"), place, DISPCallback(str(place / "small"), progress=False))),
    }
    drawn = DISPCallback(plot_directory=str(place), plot_steps=1, progress=False)
    whole = run_of(make("disp"), place, drawn)
    whole.train()
    spoiled = run_of(make("disp"), place, Spoiled(), DISPCallback(progress=False))
    spoiled.train()
    return {**found, "kept": drawn.report.ratio, "steps": [whole.state.global_step, spoiled.state.global_step]}


def test_callback(tmp_path):
    first, second = in_processes(2, under_fsdp, tmp_path / "results", tmp_path)
    assert first == second  # also where one process alone has seen what is wrong
    assert "give DISPConfig the calibration_data" in first["start"]
    assert "export_directory" in first["export"] and not (tmp_path / "small").exists()
    assert 0.49 < first["kept"] <= 0.5 and first["steps"] == [4, 2]
    assert (tmp_path / "widths.png").exists()
