"""The benchmark of all four methods on one model: every stage is measured, a second run takes up what is there."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import four_together
from examples.prose import NoTextError, handbook_files
from examples.real_model import BASE


def test_a_tied_weight_is_counted_once():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, tie_word_embeddings=True, **sizes))
    assert four_together.stored_bytes(model) == 4 * sum(p.numel() for p in model.parameters())
    assert four_together.stored_bytes(model.to(torch.bfloat16)) == 2 * sum(p.numel() for p in model.parameters())


@pytest.mark.slow
def test_every_stage_is_measured_and_kept(tmp_path, capsys):
    try:
        handbook_files()
    except NoTextError as error:
        pytest.skip(str(error))
    output = tmp_path / "result.json"
    command = ["--model", str(BASE), "--limit", "2", "--disp-steps", "4", "--tune-steps", "2", "--batch", "2"]
    command += ["--length", "64", "--training-rows", "32", "--held", "2", "--samples", "2", "--new-tokens", "4"]
    command += ["--speed-rows", "2", "--speed-tokens", "2", "--repeats", "1"]
    command += ["--work", str(tmp_path / "work"), "--output", str(output)]
    four_together.main([*command, "--sample-only"])
    first = json.loads(output.read_text())
    assert list(first["stages"]) == ["dense", "pruned", "pruned, NF4", "pruned, NF4, QST", "NF4", "NF4, QST"]
    size = {name: row["bytes"] for name, row in first["stages"].items()}
    assert size["dense"] > size["pruned"] > size["NF4"] > size["pruned, NF4"]
    assert size["pruned, NF4, QST"] > size["pruned, NF4"]
    assert first["samples"] == []
    four_together.main([*command, "--report-only"])
    second = json.loads(output.read_text())
    assert second["stages"] == first["stages"]
    assert [(row["family"], row["setting"], row["drawn"]) for row in second["samples"]] == [
        ("dense", "fixed", 2),
        ("dense", "adaptive", 2),
        ("pruned, NF4, QST", "fixed", 2),
        ("pruned, NF4, QST", "adaptive", 2),
    ]
    assert "| pruned, NF4, QST |" in capsys.readouterr().out
    # A run that lost a stage measures it again, with the models that it kept.
    del second["stages"]["pruned, NF4, QST"]
    output.write_text(json.dumps(second))
    four_together.main([*command, "--sample-only"])
    again = json.loads(output.read_text())["stages"]["pruned, NF4, QST"]
    assert again["loss"] == pytest.approx(first["stages"]["pruned, NF4, QST"]["loss"])
