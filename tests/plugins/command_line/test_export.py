"""What is written for other tools is the model, in the dense shapes, and the errors name the option."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_qst.pruning import prune_blocks
from tests.plugins.code_tokenizers import tokenizer
from tests.pruned_models import random_masks
from tests.tiny_decoders import spread, tiny_config

from .conftest import record_of

IDS = torch.arange(3, 51).reshape(2, 24)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "small"
    config = tiny_config("llama")
    config.vocab_size = len(tokenizer("gpt2"))
    model = spread(AutoModelForCausalLM.from_config(config))
    prune_blocks(model, random_masks(model)).save_pretrained(folder)
    tokenizer("gpt2").save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model):
    return model.eval()(IDS, use_cache=False).logits


def test_gguf_file(hf_qst_command, small, tmp_path):
    folder = tmp_path / "out"
    code, out, err = hf_qst_command("export", "--model", small, "--file_type", "f16", "--output_dir", folder)
    assert code == 0, err
    model = AutoModelForCausalLM.from_pretrained(small)
    again = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(model), atol=0.02 * float(logits(model).abs().max()), rtol=0)
    found = record_of(folder)
    assert found["export"]["kept_parameters"] == model.num_parameters() == found["before"]["parameters"]
    assert found["export"]["parameters"] == again.num_parameters() and f"{again.num_parameters():,}" in out
    assert found["files"]["model.gguf"] == (folder / "model.gguf").stat().st_size == found["export"]["bytes"]
    assert f"{again.num_parameters():,}" in (folder / "report.html").read_text()


PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
assert "hf_qst" not in sys.modules
with torch.no_grad():
    torch.save(model(torch.arange(3, 51).reshape(2, 24), use_cache=False).logits, sys.argv[2])
"""


def test_plain_folder_loads_without_the_package(hf_qst_command, small, tmp_path):
    folder = tmp_path / "out"
    code, out, err = hf_qst_command("export", "--model", small, "--format", "folder", "--output_dir", folder)
    assert code == 0, err
    subprocess.run([sys.executable, "-c", PLAIN, str(folder), str(tmp_path / "logits")], check=True)
    model = AutoModelForCausalLM.from_pretrained(small)
    torch.testing.assert_close(torch.load(tmp_path / "logits"), logits(model), atol=1e-4, rtol=1e-4)
    assert record_of(folder)["export"]["class"] == "LlamaForCausalLM" and f"{model.num_parameters():,}" in out
    assert AutoTokenizer.from_pretrained(folder)("def f")["input_ids"] == tokenizer("gpt2")("def f")["input_ids"]
    code, _, err = hf_qst_command("export", "--model", folder, "--format", "folder", "--output_dir", tmp_path / "again")
    assert code == 2 and "--model: to_dense takes a reshaped model" in err


def test_wrong_usage_is_named_before_anything_is_loaded(hf_qst_command, small, inputs, tmp_path):
    for argv, message in (
        (["--model", inputs / "model"], "--model: tokenizer must be a BPE model, got WordLevel"),
        (["--model", small, "--file_type", "q2"], "--file_type: Expected"),
        (["--model", small, "--format", "onnx"], "--format: Expected"),
        (["--model", small, "--adapter", inputs / "model"], "--adapter: Can't find"),
    ):
        code, _, err = hf_qst_command("export", *argv, "--output_dir", tmp_path / "out")
        assert code == 2 and message in err, err
        assert not (tmp_path / "out").exists()
    code, out, err = hf_qst_command("export", "--model", small, "--output_dir", tmp_path / "out", "--dry_run")
    assert code == 0 and "ReshapedLlamaForCausalLM" in out and not (tmp_path / "out").exists(), err
