"""One user's way through all four methods: prune, factorise, quantise, tune beside it, decode."""

import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from hf_qst import AdaptiveTemperatureLogitsProcessor, DISPCallback, DISPConfig, MixedRankConfig, QSTConfig, to_dense
from tests.architectures import NF4, tiny
from tests.plugins.code_tokenizers import tokenizer as code_tokenizer
from tests.toy_data import token_dataset

DATA = token_dataset(128)


def train(model, directory, steps, callback=None, **settings):
    defaults = {"per_device_train_batch_size": 16, "learning_rate": 3e-3, "weight_decay": 0.0, "seed": 0}
    defaults |= {"report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    defaults |= {"lr_scheduler_type": "constant", "logging_strategy": "no"}
    arguments = TrainingArguments(str(directory), max_steps=steps, **{**defaults, **settings})
    run = Trainer(model, arguments, train_dataset=DATA, data_collator=default_data_collator)
    if callback is not None:
        run.add_callback(callback)
    run.train()


@torch.no_grad()
def loss(model):
    ids = torch.tensor(DATA["input_ids"][:64])
    return model.eval()(input_ids=ids, labels=ids).loss.item()


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.slow
def test_pruned_factorised_quantised_tuned_and_decoded(tmp_path):
    torch.manual_seed(0)
    base = tiny("llama")
    base.init_weights()
    train(base, tmp_path / "out", 250)
    dense_loss, dense_size = loss(base), parameters(base)
    assert dense_loss < 2.0  # of ln 96 = 4.6: it has learned the language

    pruning = get_peft_model(base, DISPConfig(keep_ratio=0.7, task_type="CAUSAL_LM"))
    train(pruning, tmp_path / "out", 120, DISPCallback(progress=False))
    pruned = pruning.merge_and_unload()
    pruned_loss = loss(pruned)
    pruned.save_pretrained(tmp_path / "pruned")

    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert loss(pruned) == pytest.approx(pruned_loss, abs=1e-6)
    batches = [{"input_ids": torch.tensor(DATA["input_ids"][i : i + 16])} for i in range(0, 128, 16)]
    factors = MixedRankConfig(keep_ratio=0.8, calibration_data=batches, progress=False, task_type="CAUSAL_LM")
    small = get_peft_model(pruned, factors).merge_and_unload()
    small_loss, small_size = loss(small), parameters(small)
    small.save_pretrained(tmp_path / "small")
    assert small_size < 0.75 * dense_size
    assert loss(to_dense(small)) == pytest.approx(small_loss, abs=1e-4)

    quantised = AutoModelForCausalLM.from_pretrained(tmp_path / "small", quantization_config=BitsAndBytesConfig(**NF4))
    tuned = get_peft_model(quantised, QSTConfig(task_type="CAUSAL_LM", r=2, downsample="linear", side_heads="keep"))
    before = loss(tuned)
    train(tuned, tmp_path / "out", 150)
    # What pruning and factorising took away, a side network beside the 4-bit model gives back for the most part.
    assert loss(tuned) < before - 0.3 * (before - dense_loss)
    tuned.save_pretrained(tmp_path / "side")

    processor = AdaptiveTemperatureLogitsProcessor(code_tokenizer("gpt2"))
    prompt = torch.tensor(DATA["input_ids"][:2])[:, :6]
    torch.manual_seed(1)
    settings = {"max_new_tokens": 8, "do_sample": True, "top_k": 0}
    expected = tuned.generate(input_ids=prompt, logits_processor=[processor], **settings)

    code = f"""
import torch
torch.set_num_threads(1)
import hf_qst
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from tests.architectures import NF4
from tests.plugins.code_tokenizers import tokenizer
base = AutoModelForCausalLM.from_pretrained({str(tmp_path / "small")!r}, quantization_config=BitsAndBytesConfig(**NF4))
model = PeftModel.from_pretrained(base, {str(tmp_path / "side")!r})
processor = hf_qst.AdaptiveTemperatureLogitsProcessor(tokenizer("gpt2"))
torch.manual_seed(1)
tokens = model.generate(input_ids=torch.tensor({prompt.tolist()}), logits_processor=[processor], **{settings})
assert tokens.tolist() == {expected.tolist()}, tokens
"""
    subprocess.run([sys.executable, "-c", code], check=True)
