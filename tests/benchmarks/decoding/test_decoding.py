"""The decoding benchmark: its own decoders, its statistics, and a small run of the whole."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.decoding import __main__ as decoding
from benchmarks.decoding import decoders
from hf_qst_plugins.adaptive_temperature import (
    DifficultyProbe,
    Observations,
    Position,
    VocabularyTable,
    fit_difficulty_probe,
)
from hf_qst_plugins.code_evaluation import Report
from hf_qst_plugins.code_evaluation.sandbox import OUTCOMES


def report(passed: dict[str, int], samples: int = 4, **changes) -> Report:
    outcomes = dict.fromkeys(OUTCOMES, 0) | {"passed": sum(passed.values())}
    outcomes["name"] = samples * len(passed) - sum(passed.values())
    values = {
        "tasks": len(passed),
        "samples": samples * len(passed),
        "pass_at_k": {1: sum(passed.values()) / samples / len(passed)},
        "parse_rate": 1.0,
        "outcomes": outcomes,
        "distinct": 0.5,
        "tokens": 10,
        "seconds": 1.0,
        "passed": passed,
        "drawn": dict.fromkeys(passed, samples),
    }
    return Report(**{**values, **changes})


def test_top_n_sigma_keeps_what_the_definition_keeps():
    torch.manual_seed(0)
    scores = torch.randn(5, 100) * 3
    kept = decoders.TopNSigma(1.5)(None, scores)
    for row, cut in zip(scores, kept, strict=True):
        expected = {i for i, z in enumerate(row.tolist()) if z >= row.max() - 1.5 * row.std()}
        assert {i for i, z in enumerate(cut.tolist()) if z > -float("inf")} == expected
        assert 0 < len(expected) < 100


def test_figures_are_means_with_students_interval():
    rows = decoding.figures([report({"a": 4, "b": 0}), report({"a": 2, "b": 2}), report({"a": 4, "b": 4})])
    values = torch.tensor([0.5, 0.5, 1.0])
    assert rows["pass@1"]["mean"] == pytest.approx(values.mean().item())
    assert rows["pass@1"]["plus_minus"] == pytest.approx(4.30 * (values.std() / 3**0.5).item(), rel=1e-3)
    assert rows["NameError"]["mean"] == pytest.approx(1 - values.mean().item())
    assert rows["other errors"]["mean"] == 0
    assert rows["passed"] == {"a": 10, "b": 6}
    assert rows["drawn"] == 12
    assert decoding.figures([report({"a": 4})])["pass@1"]["plus_minus"] is None


def test_differences_are_paired_and_against_the_best_fixed_temperature():
    def row(family, passed, tuned_for):
        return {"family": family, "setting": "x", "tuned_for": tuned_for, "passed": passed, "drawn": 20}

    fixed = row("fixed temperature", {"a": 10, "b": 0}, [1, 10])
    better = row("learned", {"b": 20, "a": 10}, [1])
    greedy = {**row("greedy", {"a": 1, "b": 0}, [1]), "drawn": 1}
    (gain,) = decoding.differences([greedy, better, fixed])
    assert (gain["family"], gain["k"], gain["mean"]) == ("learned", 1, pytest.approx(0.5))
    assert gain["low"] <= gain["mean"] <= gain["high"]
    assert (gain["pooled"], gain["fixed"]) == (pytest.approx(0.75), pytest.approx(0.25))


@pytest.fixture(scope="module")
def probe() -> DifficultyProbe:
    tokenizer = AutoTokenizer.from_pretrained(decoding.BASE)
    torch.manual_seed(0)
    seen = Observations(torch.rand(400, 3), torch.randint(len(Position), (400,)), torch.rand(400) < 0.5)
    return fit_difficulty_probe(seen, VocabularyTable.from_tokenizer(tokenizer).tokenizer_hash)


def test_every_setting_has_a_name_of_its_own(probe):
    for family, settings in decoders.families(probe).items():
        labels = [decoder.label for decoder in settings]
        assert len(set(labels)) == len(labels) > 0, family


@pytest.mark.slow
def test_a_small_run_is_reported_and_resumed(tmp_path, probe, capsys):
    """On the base as it is, which solves none of the problems: what is tested is the way there."""
    (tmp_path / "work").mkdir()
    probe.save(tmp_path / "work" / "probe.json")
    # One thread, as everywhere in the suite: the setting outlives this test.
    command = [
        "--threads",
        "1",
        "--adapter",
        "",
        "--limit",
        "2",
        "--tune-limit",
        "1",
        "--samples",
        "2",
        "--tune-samples",
        "2",
    ]
    command += ["--draws", "2", "--new-tokens", "8", "--families", "greedy", "top-n-sigma", "learned", "entropy"]
    command += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    decoding.main(command)
    result = json.loads((tmp_path / "out" / "decoding.json").read_text())
    assert {row["family"] for row in result["rows"]} == {
        "greedy", "fixed temperature", "top-n-sigma", "learned", "entropy"
    }  # fmt: skip
    assert all(len(row["passed"]) == 2 for row in result["rows"])
    assert (tmp_path / "out" / "decoding.png").stat().st_size > 1000
    assert "| greedy |" in capsys.readouterr().out
    files = sorted((tmp_path / "work").glob("*.jsonl"))
    before = [file.read_bytes() for file in files]
    decoding.main(command)
    assert [file.read_bytes() for file in files] == before


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["--adapter", "nowhere"], "no adapter there"),
        (["--adapter", "", "--draws", "0"], "--draws 0"),
        (["--adapter", "", "--draws", "11"], "at most 10"),
    ],
)
def test_bad_arguments_are_named(command, words, capsys):
    with pytest.raises(SystemExit):
        decoding.arguments(command)
    assert words in capsys.readouterr().err
