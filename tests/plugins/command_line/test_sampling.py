"""Completions, the temperature of their tokens, code problems and speed."""

import json

import pytest
import torch

from examples.real_model import BASE
from hf_qst_plugins.adaptive_temperature import AdaptiveTemperatureLogitsProcessor
from hf_qst_plugins.command_line.sampling import temperatures

from .conftest import record_of


def test_generate_prints_and_records(hf_qst_command, inputs, tmp_path):
    argv = [
        "generate",
        "--model",
        inputs / "model",
        "--prompts",
        '["t3 t4", "t5"]',
        "--samples",
        "2",
        "--max_new_tokens",
        "5",
    ]
    code, out, err = hf_qst_command(*argv, "--output_dir", tmp_path / "out")
    assert code == 0, err
    rows = record_of(tmp_path / "out")["before"]["completions"]
    assert [row["prompt"] for row in rows] == ["t3 t4", "t3 t4", "t5", "t5"]
    printed = "".join(f"{row['prompt']}{row['text']}\n\n" for row in rows)
    assert out == f"{printed}report: {tmp_path / 'out' / 'report.html'}\n"
    assert hf_qst_command(*argv)[1] == printed and hf_qst_command(*argv, "--seed", "1")[1] != printed


def test_recorded_temperatures_are_those_at_which_tokens_were_drawn(hf_qst_command, tmp_path, monkeypatch):
    drawn = []
    original = AdaptiveTemperatureLogitsProcessor.__call__

    def watched(self, input_ids, scores):
        made = original(self, input_ids, scores)
        if scores.shape[1] > 1:  # of generate, not of the reading afterwards
            drawn.append(round(float(scores[0, 0] / made[0, 0]), 4))
        return made

    monkeypatch.setattr(AdaptiveTemperatureLogitsProcessor, "__call__", watched)
    prompt = tmp_path / "prompt.py"
    prompt.write_text("def f(values):\n    for value in values:\n")
    argv = [
        "generate",
        "--model",
        BASE,
        "--prompts_file",
        prompt,
        "--adaptive_temperature",
        "--adaptive.block_temperature",
        "1.1",
    ]
    code, _, err = hf_qst_command(*argv, "--max_new_tokens", "24", "--device", "cpu", "--output_dir", tmp_path / "out")
    assert code == 0, err
    (row,) = record_of(tmp_path / "out")["before"]["completions"]
    assert row["temperatures"] == drawn[: row["tokens"]] and set(drawn) == {1.1, 0.5}
    assert "".join(row["pieces"]) == row["text"]


def test_temperatures_of_tokens():
    def processor(ids, scores):
        return scores / (2.0 if ids[0, -1] == 7 else 0.5)

    assert temperatures(processor, torch.tensor([1, 7, 3, 7]), 2) == [2.0, 0.5]


@pytest.mark.slow
def test_evaluate_code(hf_qst_command, tmp_path):
    argv = [
        "evaluate-code",
        "--model",
        BASE,
        "--limit",
        "2",
        "--samples",
        "2",
        "--max-new-tokens",
        "24",
        "--device",
        "cpu",
    ]
    argv += ["--out", tmp_path / "samples.jsonl", "--limits.wall_seconds", "5"]
    code, _, err = hf_qst_command(*argv)
    assert code == 2 and "--allow_execution" in err and not (tmp_path / "samples.jsonl").exists(), err
    argv.append("--allow-execution")
    code, out, err = hf_qst_command(*argv, "--output_dir", tmp_path / "out")
    assert code == 0, err
    record = record_of(tmp_path / "out")
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()[1:]]
    passed = sum(sample["outcome"] == "passed" for sample in samples)
    assert record["code"]["samples"] == len(samples) == 4 and sum(record["code"]["passed"].values()) == passed
    assert f"pass@1 {passed / 4:.3f}" in out
    code, _, err = hf_qst_command(*argv, "--temperature", "0.1")
    assert code == 2 and "--out: " in err
    code, _, err = hf_qst_command(*argv, "--limits.wall_seconds", "0")
    assert code == 2 and "--limits.wall_seconds: Limits.wall_seconds must be" in err


def test_bench(hf_qst_command, inputs, tmp_path):
    argv = ["bench", "--model", inputs / "model", "--prompt_length", "8", "--new_tokens", "3", "--repeats", "3"]
    code, out, err = hf_qst_command(*argv, "--output_dir", tmp_path / "out")
    assert code == 0, err
    speed = record_of(tmp_path / "out")["speed"]
    for name, tokens in (("reading", 8), ("writing", 3)):
        seconds = sorted(speed[name]["seconds"])
        assert len(seconds) == 3 and speed[name]["tokens_per_second"] == pytest.approx(tokens / seconds[1])
        assert f"{name}: {speed[name]['tokens_per_second']:.1f} tokens/s" in out


def test_models(hf_qst_command, inputs):
    assert hf_qst_command("models", "--model", inputs / "model")[1] == "llama  qst: yes; disp: yes; mixed_rank: yes\n"
    code, out, _ = hf_qst_command("models")
    assert code == 0 and len(out.splitlines()) > 100
