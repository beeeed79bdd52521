"""That the benchmark's rows, floors and tables are what they say, at a toy model's shapes on the CPU."""

import dataclasses
import json

import pytest
import torch

from benchmarks import kernels_rows, kernels_tune
from benchmarks.kernels_peers import PLAIN, peers
from benchmarks.kernels_timing import Timer, floor_us
from hf_qst_kernels import break_even
from hf_qst_kernels.registry import OPS, ModelShape
from tests.kernels.compared import TOLERANCE, results, worst_distance

TINY = ModelShape("tiny", 64, 128, 50)
CPU = torch.device("cpu")


def measure(output, ops=OPS):
    once = [dataclasses.replace(op, rows=(2,)) for op in ops]
    return kernels_rows.measure_all(once, [TINY], CPU, torch.float32, output, compiled=False, repeats=3)


def test_every_op_gets_rows_with_a_time_and_a_floor(tmp_path):
    report = measure(tmp_path / "rows.json")
    assert json.loads((tmp_path / "rows.json").read_text()) == report
    assert {row["op"] for row in report["rows"]} == {op.name for op in OPS}
    for row in report["rows"]:
        assert "failed" not in row, row
        assert row["us_p20_p80"][0] <= row["us"] <= row["us_p20_p80"][1]
        assert row["percent_of_floor"] == pytest.approx(100 * row["floor_us"] / row["us"])
    assert {"F.linear + F.cross_entropy", "F.linear + index_add_", "library"} <= {r["variant"] for r in report["rows"]}
    assert len(kernels_rows.table(report["rows"]).splitlines()) == len(report["rows"]) + 2
    kernels_rows.plot_roofline(report, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_rows_of_the_same_kernels_are_not_measured_again(tmp_path):
    ops = [op for op in OPS if op.name == "low_rank_linear"]
    first = measure(tmp_path / "rows.json", ops)["rows"]
    assert measure(tmp_path / "rows.json", ops)["rows"] == first
    kept = json.loads((tmp_path / "rows.json").read_text())
    (tmp_path / "rows.json").write_text(json.dumps({**kept, "sources": {"low_rank.py": "another"}}))
    again = measure(tmp_path / "rows.json", ops)["rows"]
    assert len(again) == len(first) and again != first


def test_a_variant_that_is_wrong_gets_no_time(tmp_path, monkeypatch):
    op = next(op for op in OPS if op.name == "low_rank_linear")
    monkeypatch.setattr(
        kernels_rows, "peers", lambda op, compiled: {"wrong": lambda x, down, up: x @ down.T @ up.T * 2}
    )
    rows = measure(tmp_path / "rows.json", [op])["rows"]
    wrong = [row for row in rows if row["variant"] == "wrong"]
    assert wrong and all("us" not in row and "differs from the library path" in row["failed"] for row in wrong)
    assert "differs from" in kernels_rows.table(rows)


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


@pytest.mark.parametrize("op", [op for op in OPS if kernels_tune.candidates(op)], ids=lambda op: op.name)
def test_each_decision_has_a_call_to_time(op):
    (workload, *_) = op.workloads(TINY, 2, torch.float32, "cpu")
    for decision in kernels_tune.candidates(op):
        assert workload.sizes
        times = Timer(CPU, 2)(kernels_tune.call_of(op, decision, workload))
        assert times["us"] > 0 and times["host_us"] > 0


def test_written_table_is_one_that_dispatch_reads(tmp_path):
    sizes = {"rows": 1, "inputs": 64, "outputs": 64}
    entry = {
        "dtype": "bfloat16",
        "sizes": sizes,
        "triton_us": 2.0,
        "library_us": 3.0,
        "configuration": {"num_warps": 4},
    }
    kernels_tune.write_table(tmp_path / "chip.json", "chip", {"nf4_linear": [entry]}, CPU)
    table = break_even.read_table(tmp_path / "chip.json", "chip")
    assert break_even.nearest_in(table["nf4_linear"], "bfloat16", sizes).wins
