"""The pruning example on a tiny model: what it prints, what it saves, what reloads."""

import re

from transformers import AutoModelForCausalLM

from examples import prune
from hf_qst.pruning import PrunedBranch


def test_model_is_pruned_reloaded_recovered_and_saved(tiny_base, tmp_path, capsys):
    output = tmp_path / "out"
    sizes = ["--steps", "4", "--recovery-steps", "2", "--length", "64", "--training-blocks", "64", "--held-blocks", "4"]
    prune.main(
        ["--model", str(tiny_base), "--output", str(output), "--device", "cpu", "--width-multiple", "16", *sizes]
    )

    printed = capsys.readouterr().out
    lines = dict(re.findall(r"^(dense|pruned|reloaded|recovered) +([\d.]+ MB, perplexity [\d.]+)$", printed, re.M))
    assert lines.keys() == {"dense", "pruned", "reloaded", "recovered"}
    assert lines["pruned"] == lines["reloaded"] != lines["recovered"]
    assert float(lines["pruned"].split()[0]) < float(lines["dense"].split()[0])
    assert "def read_lines(path):" in printed
    assert (output / "widths.png").stat().st_size > 1000

    pruned, recovered = (AutoModelForCausalLM.from_pretrained(output / name) for name in ("model", "recovered"))
    branches = [module for module in pruned.modules() if isinstance(module, PrunedBranch)]
    assert branches and all(len(one.input_index) % 16 == 0 for one in branches if one.input_index is not None)
    shapes = lambda model: {name: p.shape for name, p in model.named_parameters()}
    assert shapes(pruned) == shapes(recovered)
