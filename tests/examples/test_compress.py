"""The compression examples on tiny sizes: what they print, what they save, what they reload."""

import re

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
)

from examples import compress_llm, compress_vit
from hf_qst.mixed_rank import LowRankLinear


def test_language_model_is_smaller_and_reloads_as_it_was(tiny_base, tmp_path, capsys):
    sizes = ["--calibration-blocks", "8", "--held-blocks", "4", "--length", "64"]
    compress_llm.main(
        ["--model", str(tiny_base), "--output", str(tmp_path), "--device", "cpu", "--keep", "0.5", *sizes]
    )
    printed = capsys.readouterr().out
    lines = dict(re.findall(r"^(dense|compressed|reloaded|in 4 bits) +([\d.]+ MB, perplexity [\d.]+)$", printed, re.M))
    assert lines.keys() == {"dense", "compressed", "reloaded", "in 4 bits"}
    assert lines["compressed"] == lines["reloaded"]
    megabytes = {what: float(line.split()[0]) for what, line in lines.items()}
    assert megabytes["in 4 bits"] < megabytes["compressed"] < megabytes["dense"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert any(isinstance(module, LowRankLinear) for module in again.modules())
    assert "def read_lines(path):" in printed


def test_vision_transformer_is_compressed_tuned_and_reloads(tmp_path, capsys):
    compress_vit.main(["--epochs", "1", "--fine-tune-epochs", "1", "--images", "64", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    counts = {what: int(n.replace(",", "")) for what, n in re.findall(r"(\w+): +([\d,]+) parameters", printed)}
    assert counts.keys() == {"dense", "compressed", "tuned", "reloaded"}  # "fine-tuned"
    assert counts["dense"] == 202_186
    # Of the dense model's 196,608 weights in its blocks, 40 % are left.
    assert counts["compressed"] == counts["reloaded"] <= 202_186 - 196_608 * 0.6
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    assert sum(p.numel() for p in again.parameters()) == counts["reloaded"]


def test_digits_are_split_by_seed_and_nothing_is_on_both_sides():
    (images, _), (others, _) = compress_vit.digits(0)
    assert images.shape[1:] == (1, 8, 8) and len(images) + len(others) == 1797 and len(others) == 540
    assert images.min() == -1 and images.max() == 1
    same = (images[:, None] == others[None, :50]).flatten(2).all(-1)
    assert not same.any()
    (again, _), _ = compress_vit.digits(1)
    assert not torch.equal(images, again)
