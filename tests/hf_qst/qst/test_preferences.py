"""Preference training goes on from a trained adapter: TRL copies it by its parameters as the frozen reference."""

import math

import pytest
import torch
from datasets import Dataset
from peft import PeftModel

from tests.architectures import side_network, side_tuned, tiny, token_batch
from tests.toy_data import tokenizer

trl = pytest.importorskip("trl")
ROWS = {"prompt": ["t5 t6"] * 8, "chosen": ["t7 t8"] * 8, "rejected": ["t9 t10"] * 8}
QUIET = {
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
}


def batches():
    return [{"input_ids": token_batch(4, 16, seed=seed)} for seed in range(2)]


@pytest.mark.parametrize("reloaded", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"downsample": "principal"},
        {"downsample": "adapter", "modules_to_save": ["lm_head"]},
        {"downsample": "avgpool", "mix": "paper", "gate_shape": "vector"},
    ],
    ids=["principal", "trained_head", "paper"],
)
def test_the_first_loss_is_that_of_two_equal_models(settings, reloaded, tmp_path):
    if settings["downsample"] == "principal":
        settings = {**settings, "calibration_data": iter(batches())}
    model = side_tuned("llama", awake=True, **settings)
    if "modules_to_save" in settings:
        torch.nn.init.normal_(model.get_base_model().lm_head.modules_to_save["default"].weight)
    if reloaded:
        model.save_pretrained(tmp_path / "adapter")
        model = PeftModel.from_pretrained(tiny("llama"), tmp_path / "adapter", is_trainable=True)
    arguments = trl.DPOConfig(str(tmp_path / "run"), max_steps=2, learning_rate=1e-2, **QUIET)
    trainer = trl.DPOTrainer(model, args=arguments, train_dataset=Dataset.from_dict(ROWS), processing_class=tokenizer())
    before = {name: p.detach().clone() for name, p in side_network(model, "ref").named_parameters()}
    trainer.train()
    first, second = (entry["loss"] for entry in trainer.state.log_history[:2])
    assert abs(first - math.log(2)) < 1e-4
    assert second < first
    assert all(torch.equal(p, before[name]) for name, p in side_network(model, "ref").named_parameters())
