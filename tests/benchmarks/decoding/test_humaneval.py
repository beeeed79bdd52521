"""The HumanEval benchmark: which problems count, how a family is tuned on the other half, and a small run of the whole."""

import json

import pytest

from benchmarks.decoding import humaneval
from benchmarks.decoding.halves import complete, form_table, joined_row, setting_row, stage_report, tables, tuned_rows
from examples.real_model import BASE
from hf_qst_plugins.code_evaluation import Report, SamplesFile, pass_at_k, read_problems, read_samples

TASKS = ["a", "b", "c", "d"]


def report(passed, drawn=10):
    """A report in which `passed` of `drawn` samples of each task pass, and the others raise a NameError."""
    samples = [
        {
            "task_id": task,
            "sample": number,
            "completion": str(number),
            "program_parses": True,
            "outcome": "passed" if number < count else "name",
            "tokens": 7,
            "seconds": 0.0,
        }
        for task, count in zip(TASKS, passed, strict=True)
        for number in range(drawn)
    ]
    return Report.of(samples)


def test_the_first_tasks_with_all_samples_of_every_setting_count():
    samples = {
        "one": [{"task_id": task} for task in "aabbcdd"],
        "two": [{"task_id": task} for task in "abcd"],
    }
    counts = {"one": 2, "two": 1}
    assert complete(samples, counts, ["b", "a", "c", "d"]) == ["b", "a"]
    assert complete(samples, counts, ["b", "d", "a"]) == ["b", "d", "a"]
    assert complete(samples, counts, ["e", "a"]) == []


def test_a_setting_is_chosen_on_the_other_half():
    """`left` is good on tasks a and c only, `right` on b and d only: what is chosen on one half fails on the other."""
    rows = [
        setting_row("fixed temperature", "left", report([9, 0, 9, 0])),
        setting_row("fixed temperature", "right", report([0, 8, 0, 8])),
        setting_row("other", "middle", report([3, 3, 3, 3])),
    ]
    first, other = (row for row in tuned_rows(rows) if row["k"] == 1)
    assert first["chosen"] == ["right", "left"]
    assert first["passed"] == [0, 0, 0, 0]
    assert "difference" not in first
    assert other["pass"]["mean"] == pytest.approx(0.3)
    assert other["difference"]["mean"] == pytest.approx(0.3)
    assert other["difference"]["low"] == pytest.approx(0.3)


def test_figures_of_a_setting():
    row = setting_row("f", "s", report([10, 0, 5, 0]))
    assert row["pass@1"]["mean"] == pytest.approx(0.375)
    assert row["pass@5"]["mean"] == pytest.approx(pass_at_k(10, [10, 0, 5, 0], 5))
    assert row["pass@1"]["low"] < 0.375 < row["pass@1"]["high"]
    assert "pass@15" not in row
    assert (row["NameError"], row["wrong"], row["tokens"]) == (pytest.approx(0.625), 0, 7)


def test_rows_of_different_tasks_are_joined():
    """The figures of all tasks at once, but for the tasks' unequal lengths and errors."""
    outcomes = ["passed", "name", "wrong", "timeout"]
    samples = [
        {
            "task_id": task,
            "sample": number,
            "completion": str(number % (place + 1)),
            "program_parses": (number + place) % 3 > 0,
            "outcome": outcomes[number * (place + 1) % 4],
            "tokens": 5 * place + number,
            "seconds": 0.0,
        }
        for place, task in enumerate(TASKS)
        for number in range(10)
    ]
    parts = [setting_row("f", "s", Report.of(part)) for part in (samples[:30], samples[30:])]
    whole = setting_row("f", "s", Report.of(samples))
    found = joined_row(*parts)
    assert list(found) == list(whole)
    assert list(found["passed"].items()) == list(whole["passed"].items())
    for name, value in whole.items():
        assert found[name] == (pytest.approx(value) if isinstance(value, float) else value), name
    assert 0 < whole["other errors"] < 1
    assert 0 < whole["distinct"] < 1
    with pytest.raises(ValueError, match="equal counts and different tasks"):
        joined_row(parts[0], whole)


def test_greedy_is_not_compared_with_many_samples():
    rows = [setting_row("greedy", "", report([1, 0, 1, 0], drawn=1))]
    rows += [setting_row("fixed temperature", "x", report([5, 0, 5, 0]))]
    stage = stage_report(rows, 9)
    greedy = [row for row in stage["tuned"] if row["family"] == "greedy"]
    assert [row["k"] for row in greedy] == [1]
    assert "difference" not in greedy[0]
    text = tables(stage)
    assert "4 of 9 problems, taken at random; 2 have a passing sample" in text
    assert "| greedy |  | 50.0 [" in text
    assert "| 2 of 4 |" in text


def test_every_setting_has_a_file_of_its_own():
    names = [
        humaneval.file_name(family, decoder)
        for stage in humaneval.stages(None)
        for family, decoders in stage.items()
        for decoder in decoders
    ]
    assert len(names) == len(set(names))


@pytest.mark.slow
def test_a_small_run_is_reported_and_resumed(tmp_path, capsys):
    command = ["--model", str(BASE), "--limit", "3", "--samples", "2", "--new-tokens", "4"]
    command += ["--difficulty", "--every", "63", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    humaneval.main(command)
    result = whole = json.loads((tmp_path / "out" / "decoding_humaneval.json").read_text())
    assert result["complete_problems"] == [3, 3, 3]
    assert [len(stage["settings"]) for stage in result["stages"]] == [1, 6, 20]
    assert {row["drawn"] for row in result["stages"][1]["settings"]} == {1, 2}
    assert "stage 2: 3 of 3 problems complete" in capsys.readouterr().out
    assert set(result["difficulty"]) == {"HumanEval's prompts and solutions", "standard library"}
    files = sorted((tmp_path / "work").iterdir())
    before = [file.read_bytes() for file in files]
    humaneval.main([*command, "--report-only"])
    assert [file.read_bytes() for file in files] == before
    # Problems that lack a sample do not count; a stage with too few is not reported, nor is one after it.
    order = result["stages"][0]["tasks"]
    cut = tmp_path / "work" / "fixed_temperature_T0.2.jsonl"
    lines = cut.read_text().splitlines(keepends=True)
    cut.write_text("".join(line for line in lines if f'"{order[2]}", "sample": 1' not in line))
    for least, stages in ((3, 1), (2, 3)):
        humaneval.main([*command, "--report-only", "--least", str(least)])
        result = json.loads((tmp_path / "out" / "decoding_humaneval.json").read_text())
        assert result["complete_problems"] == [3, 2, 2][: stages + (stages < 3)]
        assert [stage["tasks"] for stage in result["stages"]] == [order, order[:2], order[:2]][:stages]
    assert {len(row["passed"]) for row in result["stages"][2]["settings"]} == {2}
    # That result is enough to report all problems, when its last stage is drawn on the one that it lacks there.
    result["stages"][:2] = whole["stages"][:2]
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps(result))
    rest = ["--earlier", str(earlier), "--work", str(tmp_path / "rest")]
    humaneval.main([*command, *rest])
    result = json.loads((tmp_path / "out" / "decoding_humaneval.json").read_text())
    assert {path.stem for path in (tmp_path / "rest").glob("*.jsonl")} == {
        humaneval.file_name(family, one) for family, those in humaneval.stages(None)[2].items() for one in those
    }
    assert result["complete_problems"] == [3, 2, 3]
    assert [list(row["passed"]) for row in result["stages"][2]["settings"]] == [order] * 20
    assert result["difficulty"] == whole["difficulty"]
    earlier.write_text(json.dumps({**result, "stages": result["stages"][:1]}))
    with pytest.raises(ValueError, match="--earlier must be a result on the same problems"):
        humaneval.main([*command, *rest])


@pytest.mark.slow
def test_samples_are_drawn_and_judged_apart(tmp_path, capsys):
    command = ["--model", str(BASE), "--limit", "2", "--samples", "2", "--new-tokens", "4"]
    command += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    humaneval.main([*command, "--sample-only"])
    greedy = tmp_path / "work" / "greedy.jsonl"
    assert {sample["outcome"] for sample in read_samples(greedy)[1]} == {"not judged"}
    assert not (tmp_path / "out").exists()
    humaneval.main([*command, "--report-only"])
    assert "not judged" not in {sample["outcome"] for sample in read_samples(greedy)[1]}
    stage = json.loads((tmp_path / "out" / "decoding_humaneval.json").read_text())["stages"][-1]
    assert len(stage["settings"]) == 20
    assert stage["problems_ever_passed"] <= 2
    assert "adaptive, as published" in {row["family"] for row in stage["tuned"]}
    assert "2 of 2 problems" in capsys.readouterr().out


def test_problems_with_a_passing_sample_are_counted():
    rows = [
        setting_row("fixed temperature", "left", report([9, 0, 0, 0])),
        setting_row("adaptive (paper)", "a=0.8 b=0.6 line", report([0, 0, 1, 0])),
        setting_row("adaptive (paper)", "other", report([9, 9, 9, 0])),
        setting_row("fixed temperature", "right", report([1, 0, 2, 0])),
    ]
    stage = stage_report(rows, 9)
    assert stage["problems_ever_passed"] == 3
    assert [row["problems_passed"] for row in stage["settings"]] == [1, 2, 1, 3]
    published = next(row for row in stage["tuned"] if row["family"] == "adaptive, as published" and row["k"] == 1)
    assert published["pass"]["mean"] == pytest.approx(0.025)
    assert "; 3 have a passing sample" in tables(stage)


def test_both_prompt_forms_are_reported_when_both_are_complete(tmp_path):
    args = humaneval.arguments(["--model", str(BASE), "--work", str(tmp_path)])
    problems = read_problems(args.problems)[:2]
    record = {"completion": "", "program_parses": True, "outcome": "passed", "detail": "", "tokens": 3, "seconds": 0.0}

    def write(folder, name, count):
        with SamplesFile(folder / f"{name}.jsonl", {"samples": count}) as file:
            for problem in problems:
                for number in range(count):
                    file.append({**record, "task_id": problem.task_id, "sample": number})

    for folder in (tmp_path, tmp_path / "chat"):
        assert humaneval.prompt_forms(args, problems) == []
        write(folder, "greedy", 1)
        write(folder, "fixed_temperature_T0.2", 2)
    rows = humaneval.prompt_forms(args, problems)
    # A problem that lacks a sample in one file is left out of all.
    path = tmp_path / "chat" / "fixed_temperature_T0.2.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert humaneval.prompt_forms(args, problems) == []
    args.least = 1
    assert [row["passed"] for row in humaneval.prompt_forms(args, problems)] == [
        {problems[0].task_id: passed} for passed in (1, 1, 2, 2)
    ]
    assert [(row["form"], row["drawn"], row["problems_passed"]) for row in rows] == [
        ("plain", 1, 2),
        ("chat", 1, 2),
        ("plain", 2, 2),
        ("chat", 2, 2),
    ]
    assert "| greedy |  | chat | 100.0 [" in form_table(rows)


def test_bad_arguments_are_named(capsys):
    with pytest.raises(SystemExit):
        humaneval.arguments(["--model", str(BASE), "--minutes", "0"])
    assert "--minutes" in capsys.readouterr().err
