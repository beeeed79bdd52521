"""ZeRO-2 and ZeRO-3 on two processes, where DeepSpeed is installed."""

import pytest
import torch
from peft import PeftModel

from tests.conformance.methods import logits, small
from tests.distributed.processes import in_processes
from tests.distributed.training import STEPS, losses_of, make, trainer

pytest.importorskip("deepspeed", reason="needs DeepSpeed, with DS_ACCELERATOR=cpu")

METHODS = {2: ["qst", "disp", "mixed_rank"], 3: ["disp", "mixed_rank"]}


def settings(stage: int) -> dict:
    auto = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    # torch's optimiser: DeepSpeed's own would be compiled. The threshold divides small parameters too.
    return {
        **dict.fromkeys(auto, "auto"),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            "stage3_gather_16bit_weights_on_model_save": True,
            "stage3_param_persistence_threshold": 0,
        },
    }


def train(place, stage: int) -> dict:
    found = {}
    # Before any TrainingArguments, after which transformers makes every model in parts.
    for name, model in {name: make(name) for name in METHODS[stage]}.items():
        run = trainer(name, model, place / name, deepspeed=settings(stage), ddp_find_unused_parameters=None)
        run.train()
        found[name] = losses_of(run), type(run.model_wrapped).__name__, [p.data.numel() for p in model.parameters()]
    return found


def side_network_under_zero3(place) -> str:
    run = trainer("qst", make("qst"), place, deepspeed=settings(3), ddp_find_unused_parameters=None)
    try:
        run.train()
    except NotImplementedError as error:
        return str(error)
    raise AssertionError("QST trained under ZeRO-3")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_losses_are_those_of_one_process_and_the_adapter_loads(stage, tmp_path):
    results = in_processes(2, train, tmp_path / "results", tmp_path, stage, environment={"DS_ACCELERATOR": "cpu"})
    for name in METHODS[stage]:
        run = trainer(name, make(name), tmp_path / "one" / name)
        run.train()
        for found in results:
            losses, wrapper, sizes = found[name]
            assert wrapper == "DeepSpeedEngine"
            assert stage == 2 or not any(sizes)  # between the passes nothing is whole
            torch.testing.assert_close(torch.tensor(losses), torch.tensor(losses_of(run)), atol=1e-5, rtol=0)
        saved = PeftModel.from_pretrained(small(), tmp_path / name / f"checkpoint-{STEPS}")
        torch.testing.assert_close(logits(saved), logits(run.model), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_side_networks_are_refused_under_zero3(tmp_path):
    found = in_processes(
        2, side_network_under_zero3, tmp_path / "results", tmp_path, environment={"DS_ACCELERATOR": "cpu"}
    )
    assert all("FSDP2" in message for message in found)
