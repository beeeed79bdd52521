"""The example that fine-tunes the base model on problems, on a few steps."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from examples import code_problems
from hf_qst_plugins.code_evaluation import read_report


@pytest.mark.slow
@pytest.mark.parametrize("method", ["qst", "lora"])
def test_example_trains_saves_and_measures(tmp_path, capsys, method):
    arguments = ["--method", method, "--steps", "2", "--batch", "2", "--length", "64", "--problems", "2"]
    arguments += ["--samples", "2", "--temperatures", "0.8", "--device", "cpu", "--output", str(tmp_path)]
    code_problems.main(arguments)
    assert "pass@1" in capsys.readouterr().out
    assert read_report(tmp_path / "temperature_0.8.jsonl").samples == 4
    base = code_problems.load(str(code_problems.BASE), "cpu", quantized=True)
    assert PeftModel.from_pretrained(base, tmp_path).peft_config["default"].peft_type.lower() == method


def test_only_solutions_are_learned_and_every_block_is_full():
    tokenizer = AutoTokenizer.from_pretrained(code_problems.BASE)
    pairs = [('def f(x):\n    """One."""\n', "    return 1\n"), ('def g(y):\n    """Two."""\n', "    return 2\n")] * 8
    data = code_problems.CompletionBlocks(pairs, tokenizer, 16)
    ids, labels = (torch.cat([item[name] for item in data]) for name in ("input_ids", "labels"))
    assert all(item["input_ids"].shape == (16,) for item in data)
    text = tokenizer.decode(ids)
    assert text.startswith('<|endoftext|>def f(x):\n    """One."""\n    return 1\n<|endoftext|>def g(y)')
    learned = tokenizer.decode(ids[labels != -100])
    assert learned.startswith("<|endoftext|>\n    return 1\n<|endoftext|>\n    return 2\n")
    assert torch.equal(ids[labels != -100], labels[labels != -100])
