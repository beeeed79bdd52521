"""Files of an earlier state of the package load, and compute what they did when they were written.

`tests/saved_files/<day>` holds a base, adapters and reshaped models of it, all of one tiny Llama, and the logits that
each gave for `input_ids`.
"""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_qst  # noqa: F401  registers the methods

DAYS = sorted((Path(__file__).parents[2] / "saved_files").iterdir())
ADAPTERS = ["qst_adapter", "disp_adapter", "mixed_rank_adapter"]
MODELS = ["base", "pruned_model", "mixed_rank_model"]


def compare(model, folder: Path, name: str) -> None:
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        logits = model.eval()(input_ids=expected["input_ids"]).logits
    torch.testing.assert_close(logits, expected[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("folder", DAYS, ids=lambda folder: folder.name)
@pytest.mark.parametrize("name", MODELS)
def test_model_loads_and_computes_what_it_did(folder, name):
    compare(AutoModelForCausalLM.from_pretrained(folder / name), folder, name)


@pytest.mark.parametrize("folder", DAYS, ids=lambda folder: folder.name)
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_loads_and_computes_what_it_did(folder, name):
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    compare(PeftModel.from_pretrained(base, folder / name), folder, name)


def test_the_files_differ_from_their_base():
    for folder in DAYS:
        expected = load_file(folder / "expected.safetensors")
        for name in (*ADAPTERS, "pruned_model", "mixed_rank_model"):
            assert (expected[name] - expected["base"]).abs().max() > 1e-2
