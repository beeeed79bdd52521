"""Plans from a configuration, and training on stored hidden states."""

import hf_qst
from hf_qst import DISPConfig, MixedRankConfig, QSTConfig

from .conftest import record_of


def test_plan_is_that_of_the_function(hf_qst_command, inputs, tmp_path):
    model = str(inputs / "model")
    argv = ["--batch", "2", "--sequence", "64", "--device", "24GB", "--search", "false", "--output_dir"]
    code, out, err = hf_qst_command("plan", "--model", model, "--r", "8", *argv, tmp_path / "qst")
    assert code == 0, err
    expected = hf_qst.plan(model, QSTConfig(task_type="CAUSAL_LM", r=8), 2, 64, "24GB", search=False)
    assert str(expected) in out and record_of(tmp_path / "qst")["plan"]["bytes"] == expected.bytes
    assert f"{expected.total:,}" in (tmp_path / "qst" / "report.html").read_text()
    code, out, err = hf_qst_command("plan", "--model", model, "--method", "disp", *argv, tmp_path / "disp")
    assert code == 0, err
    assert str(hf_qst.plan(model, DISPConfig(task_type="CAUSAL_LM"), 2, 64, "24GB", search=False)) in out
    for keep_ratio in (None, 0.7):
        given = {} if keep_ratio is None else {"keep_ratio": keep_ratio}
        more = [part for name, value in given.items() for part in (f"--{name}", str(value))]
        folder = tmp_path / f"mixed_rank_{keep_ratio}"
        code, out, err = hf_qst_command("plan", "--model", model, "--method", "mixed_rank", *more, *argv, folder)
        assert code == 0, err
        expected = hf_qst.plan(model, MixedRankConfig(task_type="CAUSAL_LM", **given), 2, 64, "24GB", search=False)
        assert str(expected) in out and record_of(folder)["plan"]["parameters"] == expected.parameters


def test_plan_names_the_option(hf_qst_command, inputs):
    for argv, message in (
        (["--batch", "0"], "--batch: batch must be"),
        (["--method", "none"], "--method: none is for --inference"),
        (["--method", "x"], "--method: it must be one of qst, disp, mixed_rank, full, none"),
    ):
        code, _, err = hf_qst_command("plan", "--model", inputs / "model", *argv)
        assert code == 2 and message in err, err


def test_training_on_stored_states_learns_the_same(hf_qst_command, on_model, tmp_path):
    def stored():
        return sum(path.stat().st_size for path in (tmp_path / "states").rglob("*") if path.is_file())

    plain = ["--quantization", "null"]
    code, _, err = hf_qst_command(
        "cache", *on_model, *plain, "--folder", tmp_path / "states", "--output_dir", tmp_path / "c"
    )
    assert code == 0, err
    record = record_of(tmp_path / "c")["cache"]
    assert record["stored"] == record["examples"] > 0
    before = stored()
    training = [*on_model, *plain, "--max_steps", "4", "--use_cpu", "--evaluation_rows", "2"]
    for name, more in (("with", ["--hidden_state_cache", tmp_path / "states"]), ("without", [])):
        code, _, err = hf_qst_command("finetune", *training, *more, "--output_dir", tmp_path / name)
        assert code == 0, err
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("with", "without")]
    assert files[0].read_bytes() == files[1].read_bytes()
    # Training found its rows; what was added are the held-out ones.
    assert stored() - before < before / 10
