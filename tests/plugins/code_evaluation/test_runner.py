"""Sampling, the file of samples, the report: a small model that learned a few problems by heart, really sampled."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LogitsProcessor

from hf_qst_plugins.code_evaluation import (
    ExecutionNotAllowedError,
    Limits,
    Problem,
    SamplesFile,
    SamplesFileError,
    evaluate,
    paired_bootstrap,
    read_report,
    read_samples,
    truncate,
)
from hf_qst_plugins.code_evaluation.samples_file import KEYS

ROOT = Path(__file__).parents[3]
BASE = ROOT / "examples" / "base_model"


def problem(name, docstring, solution, test):
    prompt = f'def {name}(x):\n    """{docstring}"""\n'
    return Problem(name, prompt, f"    {solution}\n", f"def check(candidate):\n    {test}\n\ncheck({name})", name)


PROBLEMS = [
    problem("double", "Twice x.", "return x * 2", "assert candidate(4) == 8"),
    problem("wrong", "Less than x.", "return x + 1", "assert candidate(4) == 3"),
    problem("endless", "Never.", "while x: pass", "candidate(1)"),
    problem("bad_name", "Unknown.", "return y", "candidate(1)"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def model(tokenizer):
    """A Llama of two layers that has seen nothing but the four solutions, each with another function behind it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    tokenizer.pad_token = tokenizer.eos_token
    texts = [p.prompt.rstrip() + f"\n{p.canonical_solution}\n\ndef other():\n    return 1\n" for p in PROBLEMS]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1
    return model


class Steps(LogitsProcessor):
    """Counts how often the model was asked for a token; apart from the object, whose attributes are settings."""

    count = 0

    def __call__(self, input_ids, scores):
        Steps.count += 1
        return scores


def run(model, tokenizer, problems=PROBLEMS, **changes):
    arguments = {
        "samples": 4,
        "generate_kwargs": {"max_new_tokens": 40, "temperature": 0.5},
        "limits": Limits(wall_seconds=30, cpu_seconds=1),
        "allow_execution": True,
        "progress": False,
        "batch_size": 3,
    }
    return evaluate(model, tokenizer, problems, **{**arguments, **changes})


def comparable(path):
    return [{key: row[key] for key in KEYS if key != "seconds"} for row in read_samples(path)[1]]


@pytest.fixture(scope="module")
def finished(model, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "samples.jsonl"
    return path, run(model, tokenizer, out=path)


def test_report_counts_what_the_programs_did(finished):
    _, report = finished
    assert (report.tasks, report.samples) == (4, 16)
    assert report.passed == {"double": 4, "wrong": 0, "endless": 0, "bad_name": 0}
    assert report.pass_at_k == {1: 0.25}
    assert {name: count for name, count in report.outcomes.items() if count} == {
        "passed": 4,
        "wrong": 4,
        "timeout": 4,
        "name": 4,
    }
    assert report.parse_rate == 1.0 and report.distinct == 0.25
    # The rest of the line behind the body and the start of the next function, not all of max_new_tokens.
    assert 16 * 5 < report.tokens < 16 * 25
    # The endless program took a second once, not four times.
    assert 1 < report.seconds < 16
    assert "pass@1 0.250" in report.summary() and "timeout 4" in report.summary()
    assert paired_bootstrap(4, list(report.passed.values()), [0, 0, 0, 0], 1).mean == 0.25


def test_samples_are_one_whole_line_each_behind_the_settings(finished):
    path, report = finished
    lines = path.read_text().splitlines()
    assert len(lines) == 17 and path.read_bytes().endswith(b"\n")
    settings = json.loads(lines[0])["settings"]
    assert settings["generate_kwargs"]["temperature"] == 0.5 and settings["generate_kwargs"]["top_k"] == 0
    assert json.loads(lines[1])["completion"] == "\n    return x * 2\n\n\n"
    assert read_report(path) == report


@pytest.mark.parametrize("keep", [0, 1, 2, 6, 12, 16])
@pytest.mark.parametrize("torn", [b"", b'{"task_id": "doub'])
def test_a_run_that_was_cut_short_goes_on_where_it_stopped(model, tokenizer, finished, tmp_path, keep, torn):
    whole, _ = finished
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b"".join(whole.read_bytes().splitlines(keepends=True)[: keep + 1]) + torn)
    kept = path.read_bytes().removesuffix(torn)
    run(model, tokenizer, out=path)
    assert path.read_bytes().startswith(kept)
    assert comparable(path) == comparable(whole)


def test_a_finished_run_draws_nothing_again(model, tokenizer, tmp_path):
    arguments = {"problems": PROBLEMS[:1], "out": tmp_path / "samples.jsonl"}
    arguments["generate_kwargs"] = {"max_new_tokens": 20, "logits_processor": [Steps()]}
    first = run(model, tokenizer, **arguments)
    drawn = Steps.count
    assert drawn > 0 and run(model, tokenizer, **arguments) == first and Steps.count == drawn


def test_samples_depend_on_the_seed_and_on_nothing_drawn_before(model, tokenizer, tmp_path):
    hot = {"generate_kwargs": {"max_new_tokens": 12, "temperature": 3.0}, "limits": Limits(cpu_seconds=1)}
    problems = [PROBLEMS[0], PROBLEMS[3]]

    def completions(name, problems, **changes):
        run(model, tokenizer, problems, out=tmp_path / name, **{**hot, **changes})
        return {(row["task_id"], row["sample"]): row["completion"] for row in read_samples(tmp_path / name)[1]}

    state = torch.get_rng_state()
    first = completions("a", problems)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert completions("b", problems[::-1]) == first
    assert completions("c", problems, seed=1) != first
    assert len(set(first.values())) > 4


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"seed": 1}, "seed=0"),
        ({"samples": 5}, "samples=4"),
        ({"problems": PROBLEMS[:2]}, "problems="),
        ({"generate_kwargs": {"max_new_tokens": 40, "temperature": 0.6}}, "generate_kwargs="),
        ({"label": "other"}, "label=''"),
        ({"stop_strings": ["#"]}, "stop_strings=None"),
    ],
)
def test_a_file_of_other_settings_is_refused_and_left_as_it_is(model, tokenizer, finished, changes, word):
    path, _ = finished
    before = path.read_bytes()
    with pytest.raises(SamplesFileError) as error:
        run(model, tokenizer, **{"out": path, **changes})
    assert str(path) in str(error.value) and word in str(error.value)
    assert path.read_bytes() == before


def test_overwrite_starts_anew(model, tokenizer, tmp_path):
    path = tmp_path / "samples.jsonl"
    run(model, tokenizer, PROBLEMS[:1], out=path)
    run(model, tokenizer, PROBLEMS[:1], out=path, seed=5, overwrite=True)
    settings, samples = read_samples(path)
    assert settings["seed"] == 5 and len(samples) == 4


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"task_id": "double", "sample": 0}', None], ids=["json", "list", "keys", "twice"]
)
def test_a_damaged_line_in_the_middle_is_named(finished, tmp_path, line):
    lines = finished[0].read_text().splitlines()
    path = tmp_path / "samples.jsonl"
    path.write_text("\n".join([*lines[:3], line or lines[2], *lines[3:]]) + "\n")
    with pytest.raises(SamplesFileError, match=rf"{path}, line 4"):
        read_samples(path)


def test_two_runs_do_not_write_to_one_file(tmp_path):
    with SamplesFile(tmp_path / "s.jsonl", {"a": 1}), pytest.raises(SamplesFileError, match="another run"):
        SamplesFile(tmp_path / "s.jsonl", {"a": 1})
    with SamplesFile(tmp_path / "s.jsonl", {"a": 1}) as file:
        assert file.samples == []


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"allow_execution": False}, ExecutionNotAllowedError, ["allow_execution=True"]),
        ({"samples": 0}, ValueError, ["samples", "0"]),
        ({"batch_size": 0}, ValueError, ["batch_size", "0"]),
        ({"workers": True}, ValueError, ["workers", "True"]),
        ({"problems": []}, ValueError, ["problems"]),
        ({"generate_kwargs": {"max_new_tokens": 120}}, ValueError, ["'double'", "120", "128 positions"]),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_drawn(model, tokenizer, tmp_path, changes, error, words):
    path = tmp_path / "samples.jsonl"
    with pytest.raises(error) as raised:
        run(model, tokenizer, **{"out": path, **changes})
    assert all(word in str(raised.value) for word in words)
    assert not path.exists()


@pytest.mark.parametrize(
    ("completion", "options", "kept"),
    [
        ("\n    return 1\n\n\ndef g():\n", {}, "\n    return 1\n\n\n"),
        ("\n    if x:\n        y\n\n    return 1\n# note", {}, "\n    if x:\n        y\n\n    return 1\n"),
        ("\n    return 1\n@decorator\n", {}, "\n    return 1\n"),
        (" pass\n\tx\nprint(1)", {}, " pass\n\tx\n"),
        ("return 1\n", {}, "return 1\n"),
        ("return 1\n", {"on_new_line": True}, ""),
        ("    return 1\nx", {"on_new_line": True}, "    return 1\n"),
        ("\n    return 1  # END\n    x", {"stop_strings": ["# END"]}, "\n    return 1  "),
        (
            "def f():\n    return 1\n\nclass A:",
            {"body": False, "stop_strings": ["\nclass "]},
            "def f():\n    return 1\n",
        ),
        ("def f():\n    return 1\n", {"body": False}, "def f():\n    return 1\n"),
        ("", {}, ""),
    ],
)
def test_truncation(completion, options, kept):
    assert truncate(completion, **options) == kept
