"""That the benchmark's rows, floors and tables are what they say, at a toy model's shapes on the CPU."""

import configparser
import dataclasses
import json
import os
import subprocess
import sys
import time
from importlib import import_module

import pytest
import torch

from benchmarks.common.measure import ROOT
from benchmarks.common.timing import in_turns
from benchmarks.kernels import peers as kernels_peers
from benchmarks.kernels import rows as kernels_rows
from benchmarks.kernels import tune as kernels_tune
from benchmarks.kernels.peers import PLAIN, peers
from benchmarks.kernels.reads import READINGS
from benchmarks.kernels.registry import OPS, ModelShape
from benchmarks.kernels.timing import LEAST_REPEATS, Rows, Timer, comparable, floor_us, spread
from hf_qst_kernels import break_even, dispatch
from tests.kernels.compared import TOLERANCE, results, worst_distance

TINY = ModelShape("tiny", 64, 128, 50)
CPU = torch.device("cpu")


EVERY = (*OPS, *READINGS)


def measure(output, ops=EVERY, **more):
    once = [dataclasses.replace(op, rows=(2,)) for op in ops]
    return kernels_rows.measure_all(once, [TINY], CPU, torch.float32, output, compiled=False, repeats=3, **more)


def test_every_op_gets_rows_with_a_time_and_a_floor(tmp_path):
    report = measure(tmp_path / "rows.json")
    assert report.pop("left") == 0
    assert json.loads((tmp_path / "rows.json").read_text()) == report
    assert {row["op"] for row in report["rows"]} == {op.name for op in EVERY}
    for row in report["rows"]:
        assert "failed" not in row, row
        assert row["us_p20_p80"][0] <= row["us"] <= row["us_p20_p80"][1]
        assert row["percent_of_floor"] == pytest.approx(100 * row["floor_us"] / row["us"])
    variants = {row["variant"] for row in report["rows"]}
    assert {"F.linear + F.cross_entropy", "F.linear + index_add_", "F.max_pool1d, F.avg_pool1d", "library"} <= variants
    assert len(kernels_rows.table(report["rows"]).splitlines()) == len(report["rows"]) + 2
    kernels_rows.plot_roofline(report, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_rows_of_the_same_kernels_are_not_measured_again(tmp_path):
    ops = [op for op in OPS if op.name == "linear_index_add"]
    first = measure(tmp_path / "rows.json", ops)["rows"]
    assert measure(tmp_path / "rows.json", ops)["rows"] == first
    kept = json.loads((tmp_path / "rows.json").read_text())
    (tmp_path / "rows.json").write_text(json.dumps({**kept, "sources": {"ops/linear_index_add.py": "another"}}))
    again = measure(tmp_path / "rows.json", ops)["rows"]
    assert len(again) == len(first) and again != first


@pytest.mark.parametrize(
    ("file", "stale"),
    [
        ("ops/norm_index_select_triton.py", {"norm_index_select"}),
        (
            "ops/quantize_taps.py",
            {"quantize_taps", "dequantize_taps", "tap_linear", *(reading.name for reading in READINGS)},
        ),
        ("dispatch.py", {op.name for op in EVERY}),
        ("new.py", {op.name for op in EVERY}),
    ],
)
def test_rows_of_the_ops_whose_files_changed_are_measured_again(file, stale):
    now = kernels_rows.sources("*.py")
    assert kernels_rows.changed_ops(now, now) == set()
    assert kernels_rows.changed_ops(now, {**now, file: "another"}) == stale


def test_rows_of_other_kernels_stay(tmp_path):
    ops, output = [op for op in OPS if op.name in ("linear_index_add", "norm_gate")], tmp_path / "rows.json"
    first = {row["op"]: row for row in measure(output, ops)["rows"]}
    kept = json.loads(output.read_text())
    kept["sources"]["ops/norm_gate_triton.py"] = "another"
    output.write_text(json.dumps(kept))
    again = {row["op"]: row for row in measure(output, ops)["rows"]}
    assert again["linear_index_add"] == first["linear_index_add"] and again["norm_gate"] != first["norm_gate"]


def test_rows_of_ops_left_out_stay_and_say_of_which_commit_they_are(tmp_path):
    ops, output = [op for op in OPS if op.name in ("linear_index_add", "norm_gate")], tmp_path / "rows.json"
    first = measure(output, ops)
    others = [row for row in first["rows"] if row["op"] == "norm_gate"]
    kept = {**json.loads(output.read_text()), "commit": "before", "sources": {"dispatch.py": "another"}}
    output.write_text(json.dumps(kept))
    for _ in range(2):
        again = measure(output, [op for op in ops if op.name == "linear_index_add"])
        assert [row for row in again["rows"] if row["op"] == "norm_gate"] == others
        assert len(again["rows"]) == len(first["rows"]) and again["earlier"] == {"norm_gate": "before"}
    again = measure(output, ops)
    assert again["earlier"] == {} and [row for row in again["rows"] if row["op"] == "norm_gate"] != others


def test_rows_of_ops_that_are_no_more_go(tmp_path):
    ops, output = [op for op in OPS if op.name == "norm_index_select"], tmp_path / "rows.json"
    kept = measure(output, ops)
    old = [{**row, "op": "deleted"} for row in kept["rows"]]
    output.write_text(json.dumps({**kept, "rows": kept["rows"] + old}))
    assert measure(output, ops)["rows"] == kept["rows"]


def test_a_gpu_of_the_same_name_goes_on_and_another_cpu_does_not():
    report = {"sources": {}, "dtype": "torch.bfloat16", "machine": {"cpu": "a", "gpu": "NVIDIA H200"}}
    assert comparable(report, {**report, "machine": {"cpu": "b", "gpu": "NVIDIA H200", "gpu_memory": 1}})
    assert not comparable(report, {**report, "machine": {"cpu": "a", "gpu": "NVIDIA H100"}})
    assert not comparable({**report, "machine": {"cpu": "a"}}, {**report, "machine": {"cpu": "b"}})
    assert not comparable(report, {**report, "dtype": "torch.float16"})


def test_row_that_ended_its_process_twice_is_not_tried_again(tmp_path):
    ops, output = [op for op in OPS if op.name == "norm_index_select"], tmp_path / "rows.json"
    key = {
        "op": "norm_index_select",
        "model": "tiny",
        "rows": 2,
        "dtype": "torch.float32",
        "workload": "attention input",
    }
    rows = Rows({"rows": []}, output)
    for _ in range(2):
        assert rows.begin({**key, "variant": "library"}) is None
    failed = [row for row in measure(output, ops)["rows"] if "failed" in row]
    assert [(row["workload"], row["variant"]) for row in failed] == [("attention input", "library")]
    assert "ended or was stopped 2 times" in failed[0]["failed"] and not list(tmp_path.glob("*.begun"))


def test_rows_stop_at_their_time_and_go_on(tmp_path):
    ops = [op for op in OPS if op.name in ("norm_index_select", "quantize_taps")]
    stopped = measure(tmp_path / "rows.json", ops, until=0.0)
    assert (stopped["left"], stopped["rows"]) == (2, [])
    assert {row["op"] for row in measure(tmp_path / "rows.json", ops)["rows"]} == {op.name for op in ops}


def test_row_that_lacked_a_package_is_measured_when_it_is_there(tmp_path, monkeypatch):
    (op,) = [op for op in OPS if op.name == "linear_cross_entropy"]
    liger = {"Liger": kernels_peers.liger_cross_entropy}
    monkeypatch.setattr(kernels_rows, "peers", lambda op, compiled, device_type: liger)
    monkeypatch.setattr(kernels_peers, "find_spec", lambda name: None)
    first = [row for row in measure(tmp_path / "rows.json", [op])["rows"] if row["variant"] == "Liger"]
    assert [row["failed"] for row in first] == ["liger_kernel is not installed"] * 2
    monkeypatch.setattr(kernels_rows, "find_spec", lambda name: True)
    liger["Liger"] = kernels_peers.PLAIN[op.name]
    again = [row for row in measure(tmp_path / "rows.json", [op])["rows"] if row["variant"] == "Liger"]
    assert len(again) == 2 and all(row["us"] > 0 for row in again)


def test_pooling_is_pooling_and_reading_reads():
    x = torch.arange(64.0).view(2, 32)
    reads, pools, _ = (reading.ways("cpu") for reading in READINGS)
    assert torch.equal(pools["library"](x, True), torch.tensor([[15.0, 31.0], [47.0, 63.0]]))
    assert torch.equal(pools["library"](x, False), torch.tensor([[7.5, 23.5], [39.5, 55.5]]))
    assert torch.equal(reads["library"](x, False), x.sum(1))


def test_a_variant_that_is_wrong_gets_no_time(tmp_path, monkeypatch):
    op = next(op for op in OPS if op.name == "norm_index_select")
    twice = lambda **arguments: 2 * op.naive(**arguments)
    monkeypatch.setattr(kernels_rows, "peers", lambda op, compiled, device_type: {"wrong": twice})
    rows = measure(tmp_path / "rows.json", [op])["rows"]
    wrong = [row for row in rows if row["variant"] == "wrong"]
    assert wrong and all("us" not in row and "differs from the library path" in row["failed"] for row in wrong)
    assert "differs from" in kernels_rows.table(rows)


def test_backward_runs_on_the_backend_of_its_forward():
    (op,) = [op for op in OPS if op.name == "norm_gate"]
    (workload,) = op.workloads(TINY, 2, torch.float32, "cpu")
    seen = []

    def function(**arguments):
        output = op.function(**arguments)
        output.register_hook(lambda grad: seen.append(dispatch._forced))
        return output

    for backend in kernels_rows.BACKENDS.values():
        if backend != "triton":  # refuses a CPU
            kernels_rows.step(op, workload, function, backend)()
    assert seen == ["auto", "torch"]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_peers_compute_the_same(op):
    for workload in op.workloads(TINY, 2, torch.float32, "cpu"):
        twin = results(op.naive, workload.arguments, torch.float64)
        for name, function in {**peers(op, compiled=False), "plain": PLAIN.get(op.name, op.naive)}.items():
            ours = results(function, workload.arguments)
            # the gradient through int8 is within a half step of each entry, the others are those of the plain op
            outputs = ours[:1] if op.name == "tap_linear" else ours
            assert worst_distance(outputs, twin[: len(outputs)]) <= TOLERANCE[torch.float32], name


def test_floor_is_the_slower_of_bytes_and_products():
    limits = {"bytes_per_s": 1e12, "flops_per_s": 1e14}
    assert floor_us(2_000_000, 0, limits) == pytest.approx(2.0)
    assert floor_us(2_000_000, 10**9, limits) == pytest.approx(10.0)


def test_turns_alternate_and_a_spread_lies_within_the_times():
    order = []
    times = in_turns(
        {name: lambda name=name: order.append(name) for name in "ab"}, 2, CPU, lambda call: order.append("-")
    )
    assert "".join(order) == "-a-b" * 3 and [len(t) for t in times.values()] == [2, 2]
    middle, (low, high) = spread([1.0, 5.0])
    assert (middle, 1.0 <= low <= middle <= high <= 5.0) == (3.0, True)


def test_slow_calls_are_timed_less_often():
    assert Timer(CPU, 30)(lambda: time.sleep(0.1))["repeats"] == LEAST_REPEATS
    assert Timer(CPU, 30)(lambda: None)["repeats"] == 30
    assert Timer(CPU, 2)(lambda: time.sleep(0.1))["repeats"] == 2


@pytest.mark.parametrize("op", [op for op in OPS if op.configurations], ids=lambda op: op.name)
def test_each_decision_has_a_call_to_time(op):
    (workload, *_) = op.workloads(TINY, 2, torch.float32, "cpu")
    for decision in op.configurations:
        assert workload.sizes
        times = Timer(CPU, 2)(kernels_tune.call_of(op, decision, workload))
        assert times["us"] > 0 and times["host_us"] > 0


ENTRY = {
    "dtype": "bfloat16",
    "sizes": {"rows": 1, "inputs": 64, "outputs": 64},
    "triton_us": 2.0,
    "library_us": 3.0,
    "configuration": {"num_warps": 4},
}


def test_written_table_is_one_that_dispatch_reads(tmp_path):
    kernels_tune.write_table(tmp_path / "chip.json", "chip", {"linear_index_add": [ENTRY]}, CPU, sources={}, failed=[])
    table = break_even.read_table(tmp_path / "chip.json", "chip")
    assert break_even.nearest_in(table["linear_index_add"], "bfloat16", ENTRY["sizes"]).wins


def test_table_is_taken_up_where_it_stopped_and_forgets_kernels_that_changed(tmp_path):
    path, failing = tmp_path / "chip.json", {**ENTRY["sizes"], "rows": 2}
    table = kernels_tune.Table(path, "chip", CPU, resume=True)
    table.put("linear_index_add", torch.bfloat16, ENTRY["sizes"], {**ENTRY, "triton_us": 9.0})
    table.put("linear_index_add", torch.bfloat16, ENTRY["sizes"], ENTRY)
    table.put("linear_index_add", torch.bfloat16, failing, {"failed": "out of shared memory"})
    table.write()
    again = kernels_tune.Table(path, "chip", CPU, resume=True)
    (measured, impossible) = again.decisions["linear_index_add"]
    assert measured == ENTRY and impossible["sizes"] == failing
    # nor does dispatch go by the shape beside it
    read = break_even.read_table(path, "chip")["linear_index_add"]
    assert [break_even.nearest_in(read, "bfloat16", sizes).wins for sizes in (ENTRY["sizes"], failing)] == [True, False]
    assert all(again.known("linear_index_add", torch.bfloat16, sizes) for sizes in (ENTRY["sizes"], failing))
    assert not again.known("linear_index_add", torch.float16, ENTRY["sizes"])
    fresh = kernels_tune.Table(path, "chip", CPU, resume=False)
    assert not fresh.known("linear_index_add", torch.bfloat16, ENTRY["sizes"])
    kept = json.loads(path.read_text())
    path.write_text(json.dumps({**kept, "sources": {**kept["sources"], "ops/linear_index_add_triton.py": "another"}}))
    assert kernels_tune.Table(path, "chip", CPU, resume=True).decisions == {}
    for _ in range(2):  # tuning another op leaves them, and says of which commit they are
        table = kernels_tune.Table(path, "chip", CPU, True, [op for op in OPS if op.name == "norm_gate"])
        assert table.decisions["linear_index_add"] == [ENTRY, impossible]
        assert table.earlier == {"linear_index_add": kept["commit"]}
        table.write()
    assert kernels_tune.Table(path, "chip", CPU, resume=True).decisions == {}


TUNE = """
import dataclasses, sys, torch
from pathlib import Path
from benchmarks.kernels.tune import tune
from benchmarks.kernels.registry import OPS, ModelShape
ops = [dataclasses.replace(op, rows=(1, 2)) for op in OPS if op.name in ("norm_index_select", "quantize_taps")]
more = {"until": float(sys.argv[2]), "resume": True, "device": torch.device("cpu")}
print(tune(ops, [ModelShape("tiny", 64, 128, 50)], torch.float32, Path(sys.argv[1]), 2, **more)[1])
"""


def tuned(folder, until="inf"):
    """Shapes left by `tune` in Triton's interpreter, a process of its own."""
    variables = {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [sys.executable, "-c", TUNE, str(folder), until]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.splitlines()[-1])


def test_tuning_writes_a_table_with_a_configuration_for_each_shape(tmp_path):
    pytest.importorskip("triton")
    assert tuned(tmp_path, until="0") == 2 and break_even.read_table(tmp_path / "cpu.json", "cpu") == {}
    assert tuned(tmp_path) == 0
    table = break_even.read_table(tmp_path / "cpu.json", "cpu")
    assert set(table) == {"norm_index_select", "norm_index_select_backward"}
    module = import_module("hf_qst_kernels.ops.norm_index_select_triton")
    for decision, entries in table.items():
        assert sorted(entry.sizes["rows"] for entry in entries) == [1, 2]
        for entry in entries:
            assert entry.configuration in module.CONFIGURATIONS[decision]
            assert 0 < entry.triton_us < kernels_tune.NEVER and not entry.wins  # not an interpreter
    assert json.loads((tmp_path / "cpu.json").read_text())["failed"] == []


def test_configurations_that_cannot_run_leave_no_entry():
    """A CPU tensor is one: there every configuration is refused."""
    (op,) = [op for op in OPS if op.name == "linear_index_add"]
    (workload, *_) = op.workloads(TINY, 2, torch.float32, "cpu")
    ((decision, entry),) = kernels_tune.tune_workload(op, workload, torch.float32, Timer(CPU, 2))
    assert decision == "linear_index_add" and "needs CUDA tensors" in entry["failed"]


def test_installed_table_is_where_dispatch_looks(tmp_path):
    kernels_tune.write_table(tmp_path / "chip.json", "chip", {}, CPU)
    assert kernels_tune.install(tmp_path / "chip.json", tmp_path / "measured").read_bytes()
    assert break_even.read_table(tmp_path / "measured" / "chip.json", "chip") == {}


def test_shipped_tables_are_part_of_the_package():
    options = configparser.ConfigParser()
    options.read(ROOT / "setup.cfg")
    patterns = options["options.package_data"]["hf_qst_kernels"].split()
    pattern = next(pattern for pattern in patterns if pattern.endswith(".json"))
    assert break_even.SHIPPED.resolve() == (ROOT / "kernels" / "hf_qst_kernels" / pattern).parent.resolve()
    assert (break_even.SHIPPED / "nvidia_h200.json").match(pattern)
    for path in break_even.SHIPPED.glob("*.json"):
        break_even.read_table(path, path.stem)
