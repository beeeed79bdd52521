"""Each method's command on a tiny model: its files load, and its record says what they hold."""

import json
import signal
import time

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_qst import QSTConfig
from hf_qst.mixed_rank import rank_report
from hf_qst_plugins.command_line.folders import last_checkpoint
from hf_qst_plugins.inputs import held_out_loss, read_rows, token_rows

from .conftest import process, record_of

TRAINING = ["--max_steps", "4", "--logging_steps", "1", "--per_device_train_batch_size", "4", "--use_cpu"]


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def held_out(inputs):
    """The rows that a command sets aside: the last twentieth."""
    rows = token_rows(read_rows(str(inputs / "text.jsonl")), AutoTokenizer.from_pretrained(inputs / "model"), 16)
    return rows.rows[-(len(rows) // 20) :]


def check_sizes(measured):
    assert measured["parameters"] == sum(row["parameters"] for row in measured["layers"])
    assert measured["bytes"] == sum(row["bytes"] for row in measured["layers"])


def test_finetune(hf_qst_command, inputs, on_model, tmp_path):
    folder = tmp_path / "out"
    argv = ["finetune", *on_model, *TRAINING, "--output_dir", folder, "--quantization", "null", "--prompts", "t3 t4"]
    argv += ["--max_new_tokens", "4", "--other_data", inputs / "other.jsonl"]
    code, _, err = hf_qst_command(*argv)
    assert code == 0, err
    record = record_of(folder)
    base = AutoModelForCausalLM.from_pretrained(inputs / "model").eval()
    assert record["before"]["parameters"] == parameters(base) and record["before"]["bytes"] == 4 * parameters(base)
    assert record["before"]["perplexity"]["in_domain"]["loss"] == held_out_loss(base, held_out(inputs), 4)
    size = parameters(base)
    tuned = PeftModel.from_pretrained(base, folder).eval()
    after = record["after"]
    assert after["parameters"] == parameters(tuned)
    assert after["perplexity"]["in_domain"]["loss"] == held_out_loss(tuned, held_out(inputs), 4)
    assert after["perplexity"]["in_domain"]["loss"] < record["before"]["perplexity"]["in_domain"]["loss"]
    assert after["perplexity"]["other"]["rows"] == 64
    for measured in (record["before"], after):
        check_sizes(measured)
    # The base's blocks are the same rows in both.
    assert {"model.layers.0", "model.embed_tokens", "lm_head"} <= {row["name"] for row in after["layers"]}
    assert after["completions"][0]["prompt"] == "t3 t4" and after["completions"][0]["tokens"] <= 4
    assert [row["step"] for row in record["training"]["log"]] == [1, 2, 3, 4]
    assert record["training"]["trainable_parameters"] == parameters(tuned) - size
    assert record["files"]["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").stat().st_size
    assert (
        record["command_line"].startswith("hf-qst finetune --model")
        and record["versions"]["torch"] == torch.__version__
    )

    code, out, _ = hf_qst_command("evaluate", *on_model, "--adapter", folder)
    assert code == 0 and "perplexity" in out
    code, _, err = hf_qst_command(*argv)
    assert code == 2 and "is not empty; give another folder, or --overwrite" in err
    code, _, err = hf_qst_command(*argv, "--overwrite")
    assert code == 0, err


def test_finetune_in_four_bits_counts_values_and_bytes(hf_qst_command, inputs, on_model, tmp_path):
    code, _, err = hf_qst_command("finetune", *on_model, *TRAINING, "--output_dir", tmp_path / "out")
    assert code == 0, err
    before = record_of(tmp_path / "out")["before"]
    base = AutoModelForCausalLM.from_pretrained(inputs / "model")
    assert before["parameters"] == parameters(base)
    linear = sum(p.numel() for name, p in base.named_parameters() if "proj" in name)
    assert 4 * (parameters(base) - linear) + linear / 2 < before["bytes"] < 4 * (parameters(base) - linear) + linear


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "ended"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_stopped_training_saves_names_its_checkpoint_and_goes_on_to_the_same_weights(
    number, code, ended, hf_qst_command, on_model, tmp_path
):
    options = [*on_model, "--quantization", "null", "--use_cpu", "--save_steps", "2", "--seed", "3"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    # Far more steps than will be run; the learning rate does not depend on their number.
    options += ["--lr_scheduler_type", "constant", "--per_device_train_batch_size", "2"]
    running = process("finetune", *options, "--output_dir", cut, "--max_steps", "100000")
    try:
        until = time.monotonic() + 300
        while last_checkpoint(cut) is None:
            assert running.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        running.send_signal(number)
        _, err = running.communicate(timeout=120)
    finally:
        running.kill()
    assert running.returncode == code
    checkpoint = last_checkpoint(cut)
    assert f"{number.name}: saved {checkpoint}; training ends here" in err
    assert f"{ended}. The last whole checkpoint is {checkpoint}; the same command with --resume goes on from it" in err
    step = int(checkpoint.name.rpartition("-")[2])
    # A checkpoint that was cut short is passed over.
    (cut / f"checkpoint-{step + 2}").mkdir(exist_ok=True)
    (cut / f"checkpoint-{step + 2}" / "trainer_state.json").write_text("{")
    assert last_checkpoint(cut) == checkpoint
    steps = ["--max_steps", str(step + 4)]
    code, _, err = hf_qst_command("finetune", *options, *steps, "--output_dir", cut, "--resume")
    assert code == 0, err
    assert record_of(cut)["training"]["resumed_from"] == checkpoint.name
    code, _, err = hf_qst_command("finetune", *options, *steps, "--output_dir", whole)
    assert code == 0, err
    assert (cut / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()


def test_side_network_of_principal_directions_is_calibrated_on_the_data(
    hf_qst_command, on_model, tmp_path, monkeypatch
):
    seen = []
    original = QSTConfig.__post_init__

    def watched(self):
        original(self)
        seen.append(self.calibration_data)

    monkeypatch.setattr(QSTConfig, "__post_init__", watched)
    argv = ["finetune", *on_model, *TRAINING, "--output_dir", tmp_path / "out", "--quantization", "null"]
    code, _, err = hf_qst_command(*argv, "--downsample", "principal", "--calibration_rows", "6")
    assert code == 0, err
    assert [len(batch["input_ids"]) for batch in next(data for data in seen if data)] == [4, 2]


def test_interruption_before_a_checkpoint(hf_qst_command, on_model, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.Trainer.training_step", interrupt)
    # A checkpoint of an earlier training is nothing to go on from.
    earlier = tmp_path / "out" / "checkpoint-7"
    earlier.mkdir(parents=True)
    (earlier / "trainer_state.json").write_text("{}")
    argv = ["finetune", *on_model, *TRAINING, "--output_dir", tmp_path / "out", "--quantization", "null", "--overwrite"]
    assert hf_qst_command(*argv, "--dry_run")[0] == 0 and earlier.exists()
    code, _, err = hf_qst_command(*argv)
    assert code == 130 and "interrupted. There is no whole checkpoint yet.\n" in err


@pytest.mark.parametrize(
    "argv",
    [
        ["prune", "--method", "disp", *TRAINING, "--keep_ratio", "0.6"],
        ["prune", "--method", "flap", "--keep_ratio", "0.6"],
        ["prune", "--method", "magnitude", "--keep_ratio", "0.6", "--allocation", "global"],
        ["compress", "--keep_ratio", "0.6", "--allocation", "uniform"],
        ["compress", "--keep_ratio", "0.6", "--quantize_factors", "int8"],
    ],
    ids=lambda argv: " ".join(argv[:3]),
)
def test_smaller_models(hf_qst_command, inputs, on_model, tmp_path, argv):
    folder = tmp_path / "out"
    code, _, err = hf_qst_command(argv[0], *on_model, *argv[1:], "--output_dir", folder)
    assert code == 0, err
    record = record_of(folder)
    small = AutoModelForCausalLM.from_pretrained(folder).eval()
    after = record["after"]
    assert after["perplexity"]["in_domain"]["loss"] == held_out_loss(small, held_out(inputs), 4)
    check_sizes(after)
    assert after["parameters"] < record["before"]["parameters"] and after["bytes"] < record["before"]["bytes"]
    # Layers keep the names of the dense model's, without the branch around them.
    own_names = [{**row, "name": row["name"].replace(".module.", ".")} for row in rank_report(small)]
    assert after["linear_layers"] == own_names
    assert {row["name"] for row in own_names} <= {row["name"] for row in record["before"]["linear_layers"]}
    blocks = {
        when: sum(row["parameters"] for row in record[when]["linear_layers"] if "layers" in row["name"])
        for when in ("before", "after")
    }
    assert 0.5 < blocks["after"] / blocks["before"] <= 0.62
    assert ("training" in record) == ("disp" in argv)
    code, out, _ = hf_qst_command("generate", "--model", folder, "--prompts", "t3 t4", "--temperature", "0")
    assert code == 0 and out.startswith("t3 t4")


def test_compression_from_disk_writes_the_same_files(hf_qst_command, on_model, tmp_path):
    for name, switch in (("in_memory", []), ("from_disk", ["--from_disk"])):
        argv = ["compress", *on_model, "--keep_ratio", "0.6", "--output_dir", tmp_path / name, *switch]
        code, _, err = hf_qst_command(*argv)
        assert code == 0, err
    files = [{path.name: path for path in (tmp_path / name).iterdir()} for name in ("in_memory", "from_disk")]
    assert files[0].keys() == files[1].keys()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert files[0][name].read_bytes() == files[1][name].read_bytes()
    record = record_of(tmp_path / "from_disk")
    assert "before" not in record and record["compression"]["parameters_before"] == 123_328
    assert f"{record['compression']['parameters']:,} in " in err and record["compression"]["peak_memory"] > 2**26


def test_record_is_strict_json(hf_qst_command, on_model, tmp_path):
    code, _, err = hf_qst_command("evaluate", *on_model, "--output_dir", tmp_path / "out")
    assert code == 0, err

    def refuse(value):
        raise AssertionError(value)

    text = (tmp_path / "out" / "hf_qst_run.json").read_text()
    assert json.loads(text, parse_constant=refuse)["command"] == "evaluate"
