"""The one command for every row: stages, what it leaves, and what it concludes."""

import json
import sys
import time

import pytest

from benchmarks.kernels import __main__ as kernels
from benchmarks.kernels import end_to_end as kernels_end_to_end
from benchmarks.kernels import rows as kernels_rows
from benchmarks.kernels import stages as kernels_all
from benchmarks.kernels.aims import aims, never_wins
from benchmarks.kernels.registry import MODELS
from benchmarks.kernels.stages import STAGES, Plan


def command(monkeypatch, folder, *more):
    arguments = ["kernels", "--all", "--tiny", "--repeats", "2", "--output-dir", str(folder), "--ops", "norm_gate"]
    monkeypatch.setattr(sys, "argv", [*arguments, *more])
    kernels.main()
    return json.loads((folder / "kernels_stages_cpu_all.json").read_text())


def test_one_command_makes_all_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    # whoever edits a source while this runs would have it measured again
    monkeypatch.setattr(kernels_end_to_end, "fingerprint", lambda: "unchanged")
    monkeypatch.setattr(kernels_rows, "sources", lambda pattern: {"all": "unchanged"})
    before = command(monkeypatch, tmp_path, "--seconds", "1e-9")["stages"]
    assert before["rows"]["left"] == 1 and before["end to end"]["left"] == 3
    assert "The same command goes on" in capsys.readouterr().out

    report = command(monkeypatch, tmp_path)
    assert {name for name, stage in report["stages"].items() if "skipped" in stage} == {
        "device tests", "tune", "sanitizer", "rows with torch.compile"
    }  # fmt: skip
    assert report["stages"]["rows"]["left"] == report["stages"]["end to end"]["left"] == 0
    assert all(aim["met"] is None for aim in report["aims"]) and report["never_wins"] == []
    shown = capsys.readouterr().out
    assert "Nothing is left" in shown and "| 3 K1 |" in shown
    assert (tmp_path / "kernels_summary_cpu_all.md").read_text().strip() in shown
    assert (tmp_path / "kernels_cpu_all_roofline.png").read_bytes().startswith(b"\x89PNG")

    files = {path: path.read_text() for path in tmp_path.glob("kernels_*cpu_all.json") if "stages" not in path.name}
    command(monkeypatch, tmp_path)
    # both stages are done, unless a source was edited meanwhile
    assert {path: json.loads(path.read_text())["rows"] for path in files} == {
        path: json.loads(text)["rows"] for path, text in files.items()
    }


def plan(folder, **changes):
    return Plan("cpu", "float32", 60.0, str(folder), 2, **{"tiny": True, "ops": ["norm_gate"], **changes})


def test_models_of_most_interest_come_first(tmp_path):
    names = [model.name for model in plan(tmp_path, tiny=False).chosen_models]
    assert names[:2] == ["Llama-3-8B", "Llama-2-7B"] and sorted(names) == sorted(m.name for m in MODELS)
    few = plan(tmp_path, tiny=False, models=["ViT-B", "Llama-2-7B"]).chosen_models
    assert [model.name for model in few] == ["Llama-2-7B", "ViT-B"]


def test_stage_in_a_process_of_its_own(tmp_path):
    found = kernels_all.run_isolated("rows", plan(tmp_path), time.time() + 60)
    assert found["left"] == 0 and found["found"].endswith("rows, 0 of them without a time")
    assert not list(tmp_path.glob(".*"))


def test_stage_whose_process_dies_is_started_again_and_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels_all.sys, "executable", "/bin/false")
    found = kernels_all.run_isolated("rows", plan(tmp_path), time.time() + 60)
    assert found["failed"] == f"its process ended {kernels_all.STARTS} times"
    assert found["faults"] == ["exit code 1: "] * kernels_all.STARTS


def test_stage_that_fails_leaves_the_others(tmp_path, monkeypatch):
    def broken(plan, until):
        raise OSError("disk is full")

    monkeypatch.setattr(kernels_all, "STAGES", {"rows": (broken, False), "end to end": STAGES["tune"]})
    stages = kernels_all.run_all(plan(tmp_path))["stages"]
    assert stages["rows"]["failed"] == "OSError: disk is full" and "skipped" in stages["end to end"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ship"], "give one of them"),
        (["--all"], "--tiny to try it"),
        (["--all", "--tiny", "--seconds", "0"], "--seconds 0.0: give a number above 0"),
        (["--tune"], "--tune measures on a GPU"),
    ],
)
def test_options_that_make_no_sense_are_refused(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["kernels", *arguments])
    with pytest.raises(SystemExit):
        kernels.main()
    assert message in capsys.readouterr().err


def test_chosen_stages_alone_are_run(tmp_path, monkeypatch):
    chosen = ["rows", "tune"]
    monkeypatch.setattr(kernels_all, "STAGES", dict.fromkeys([*chosen, "end to end"], (lambda p, u: (0, "ran"), False)))
    stages = kernels_all.run_all(plan(tmp_path, stages=chosen))["stages"]
    assert [stages[name].get("found") for name in chosen] == ["ran", "ran"]
    assert stages["end to end"]["skipped"] == "left out"


def row(op, variant, us, model="Llama-3-8B", rows=4, workload="w", **more):
    key = {"op": op, "model": model, "rows": rows, "workload": workload, "dtype": "torch.bfloat16", "variant": variant}
    return {**key, "us": us, **more}


def met(rows, missing=None):
    return {aim["aim"]: aim["met"] for aim in aims(rows, missing)}


def test_aims_without_rows_are_not_measured():
    assert set(met([]).values()) == {None}


def test_aims_are_met_at_their_limits_and_not_beyond():
    head = "linear_cross_entropy"
    fine = [
        row(head, "Liger", 100.0, peak_bytes=1000),
        row(head, "auto", 105.0, peak_bytes=1000),
        row("read once", "library", 12.0, workload="sum of each row"),
        row("read once", "library", 10.0, workload="largest of each row"),
        row("tap forward", "auto", 12.0, workload="to 16, full"),
        row("tap forward", "library", 30.0, workload="to 16, full"),
        row("tap pooling", "F.max_pool1d, F.avg_pool1d", 13.0, workload="maxpool"),
        row("tap pooling", "library", 10.0, workload="maxpool"),
        row("norm_index_select", "triton", 7.5),
        row("norm_index_select", "library", 10.0),
        row("linear_index_add", "triton", 8.0),
        row("linear_index_add", "library", 12.0),
        row("linear_index_add", "F.linear + index_add_", 10.0),
        row("norm_gate", "triton", 90.0),
        row("norm_gate", "auto", 13.0),
        row("norm_gate", "library", 13.0),
    ]
    found = met(fine)
    assert all(found[name] for name in ("1 memory", "1 time", "2 rank 16, full", "3 K1", "3 K3", "default norm_gate"))
    assert found["2 pooling"] is False and found["2 rank 16, int8"] is None
    # a little worse, each
    worse = {("auto", 105.0): 106.0, ("auto", 12.0): 12.1, ("triton", 7.5): 7.6, ("triton", 8.0): 8.1}
    rows = [{**r, "us": worse.get((r["variant"], r["us"]), r["us"])} for r in fine]
    rows = [{**r, "peak_bytes": 1001} if r["variant"] == "auto" and "peak_bytes" in r else r for r in rows]
    found = met(rows)
    assert not any(found[name] for name in ("1 memory", "1 time", "2 rank 16, full", "3 K1", "3 K3"))
    slow = [{**r, "us": 14.0} if (r["op"], r["variant"]) == ("norm_gate", "auto") else r for r in fine]
    assert met(slow)["default norm_gate"] is False


def test_an_op_that_wins_nowhere_is_to_be_deleted():
    rows = [
        row("a", "triton", 5.0), row("a", "library", 6.0), row("a", "torch.compile", 4.0),
        row("b", "triton", 5.0), row("b", "library", 6.0),
        row("b", "triton", 9.0, rows=8), row("b", "library", 6.0, rows=8),
        row("c", "library", 6.0), row("d", "triton", 6.0), row("d", "auto", 7.0),
    ]  # fmt: skip
    assert never_wins(rows) == ["a"]
