"""What is offered to PEFT's method comparison: configurations that load, and the committed runs in its rows' form."""

import json

from peft import PeftConfig

from benchmarks.common.measure import RESULTS
from benchmarks.side_tuning import peft_board
from benchmarks.side_tuning.real_model_report import best_runs
from hf_qst import QSTConfig


def test_experiments_and_rows(tmp_path, capsys):
    peft_board.main(["--output", str(tmp_path)])
    printed = capsys.readouterr().out
    for name, (config, _) in peft_board.EXPERIMENTS.items():
        folder = tmp_path / "experiments" / "qst" / name
        found = PeftConfig.from_pretrained(folder)
        assert isinstance(found, QSTConfig) and found.tail_layers == config.tail_layers
        assert json.loads((folder / "training_params.json").read_text())["optimizer_kwargs"]["lr"] > 0
        assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "training_params.json"]
    measured = json.loads((RESULTS / "side_tuning_real_model.json").read_text())
    rows = [json.loads(path.read_text()) for path in (tmp_path / "results").iterdir()]
    types = {row["run_info"]["peft_config"]["peft_type"].partition(" ")[0] for row in rows}
    assert types >= {"QST", "LORA"}
    default = next(
        row for row in rows if row["run_info"]["experiment_name"] == f"qst/{measured['model']}-sentiment-default"
    )
    task = next(name for name in measured["tasks"] if name.startswith("sentiment"))
    best = best_runs(measured["tasks"][task]["runs"])["default"][0]
    last = default["train_info"]["metrics"][-1]
    assert last["test accuracy"] == best["accuracy"] / 100 and last["test loss"] == best["loss"]
    assert default["train_info"]["num_trainable_params"] == best["parameters"]
    assert last["forgetting"] == best["old_loss"] - measured["tasks"][task]["base"]["old_loss"]
    lacking = peft_board.missing(default)
    assert "train_info: accelerator_memory_max" in lacking and "metrics: test accuracy" not in lacking
    assert all(f"- {name}" in printed for name in lacking)
