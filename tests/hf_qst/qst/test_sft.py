"""Side tuning through TRL's `SFTTrainer`, which computes losses of its own and casts what it trains."""

import math

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hf_qst import QSTConfig
from tests.architectures import digest, in_nf4, side_network, tiny, token_batch
from tests.toy_data import text_dataset, tokenizer


def sft(directory, base, **settings):
    defaults = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_steps": 24,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "max_length": 16,
        "bf16": False,
        "gradient_checkpointing": False,
        "lr_scheduler_type": "constant",
        "dataset_text_field": "text",
    }
    arguments = SFTConfig(str(directory), **{**defaults, **settings})
    config = QSTConfig(task_type="CAUSAL_LM", r=4, downsample_rank=4)
    return SFTTrainer(base, arguments, train_dataset=text_dataset(64), processing_class=tokenizer(), peft_config=config)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


SETTINGS = {
    "plain": {},
    "packing": {"packing": True},
    "padding_free": {"padding_free": True, "max_length": None},
    "accumulation": {"gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize(
    ("kind", "name"), [*(("float32", name) for name in SETTINGS), ("nf4", "packing"), ("nf4", "accumulation")]
)
def test_loss_falls_gates_move_and_the_base_stays(tmp_path, kind, name):
    base = in_nf4(tmp_path / "base") if kind == "nf4" else tiny("llama")
    with torch.no_grad():
        base(token_batch())
    before = digest(base)
    run = sft(tmp_path / "out", base, **SETTINGS[name])
    run.train()
    network = side_network(run.model)
    assert sum(losses(run)[-5:]) < 0.95 * sum(losses(run)[:5])
    assert digest(run.model.get_base_model()) == before
    # TRL casts what it trains on a quantised base to bfloat16, where a gate could not move.
    assert all(gate.value.dtype == torch.float32 and gate.value.abs().item() > 1e-4 for gate in network.gates)
    assert network.mix.alpha.value.dtype == torch.float32
    assert network.mix.alpha.value.abs().item() > 1e-4


def test_optimizer_steps_the_gates_it_was_given(tmp_path):
    """The cast back to float32 must keep the parameter the optimizer holds, with its gradient in the same dtype."""
    run = sft(tmp_path / "out", in_nf4(tmp_path / "base"), max_steps=2)
    run.train()
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    network = side_network(run.model)
    assert all(id(p) in held for p in network.parameters())
    assert all(gate.value.grad is None or gate.value.grad.dtype == torch.float32 for gate in network.gates)


def test_chunked_nll_loss_trains_alike(tmp_path):
    """TRL's fused head calls the decoder stack itself and never the model's forward."""
    results = []
    for loss_type in ("nll", "chunked_nll"):
        torch.manual_seed(3)
        run = sft(tmp_path / loss_type, tiny("llama"), max_steps=6, loss_type=loss_type, seed=1)
        run.train()
        results.append(torch.tensor(losses(run)))
    torch.testing.assert_close(results[1], results[0], atol=2e-3, rtol=2e-3)


def test_resumed_run_gives_the_weights_of_an_uninterrupted_one(tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "packing": True}
    straight = sft(tmp_path / "straight", tiny("llama"), **settings)
    straight.train()
    resumed = sft(tmp_path / "resumed", tiny("llama"), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
    expected = side_network(straight.model).state_dict()
    for name, tensor in side_network(resumed.model).state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_preference_training_starts_at_the_base_and_learns(tmp_path):
    """DPO takes the base for its reference by disabling the adapter: at the start both are equal."""
    rows = {"prompt": ["t5 t6"] * 8, "chosen": ["t7 t8"] * 8, "rejected": ["t9 t10"] * 8}
    arguments = DPOConfig(
        str(tmp_path), max_steps=4, report_to=[], use_cpu=True, bf16=False, learning_rate=1e-2, logging_steps=1,
        gradient_checkpointing=False, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    run = DPOTrainer(
        tiny("llama"),
        args=arguments,
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer(),
        peft_config=QSTConfig(task_type="CAUSAL_LM", r=4),
    )
    run.train()
    assert losses(run)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(run)[-1] < 0.6
