"""The kernels' end-to-end benchmark on toy models: its cases, its rows, its file."""

import json

import pytest
import torch

from benchmarks.kernels import end_to_end as benchmark
from benchmarks.kernels.end_to_end_cases import CASES, LLAMAS, TINY, Decoder, Made, decoding, dense_llama
from hf_qst_kernels import dispatch

CPU = torch.device("cpu")


def test_every_case_runs_with_kernels_on_and_off(tmp_path):
    output = tmp_path / "rows.json"
    report = benchmark.measure_all(CPU, ["tiny"], output, TINY)
    assert report.pop("left") == [] and json.loads(output.read_text()) == report
    assert {row["case"] for row in report["rows"]} == set(CASES)
    for row in report["rows"]:
        for way, found in row["ways"].items():
            assert "failed" not in found, (row["case"], way)
            assert 0 < found["seconds_p20_p80"][0] <= found["seconds"] <= found["seconds_p20_p80"][1]
        assert row["ways"]["auto"]["faster"] > 0
        if row["case"] != "QST step":  # whose weights move between two calls
            assert row["ways"]["auto"]["difference"] <= 1e-5
    (pruned,) = [row for row in report["rows"] if row["case"] == "pruned decoding"]
    assert pruned["kept"] == pytest.approx(0.5, abs=0.03)
    assert benchmark.table(report["rows"]).count("\n") == 1 + sum(len(row["ways"]) for row in report["rows"])
    again = benchmark.measure_all(CPU, ["tiny"], output, TINY, until=0.0)
    assert again["rows"] == report["rows"] and again["left"] == []


def test_decoding_is_a_graph_at_each_batch_and_eager_at_the_first():
    names = lambda device: [name for name, _ in decoding(dict, (2, 8), torch.device(device), TINY)]
    assert names("cuda") == ["batch 2, graph", "batch 8, graph", "batch 2, eager"]
    assert names("cpu") == ["batch 2, eager"]


def test_case_that_fails_says_why_and_the_others_run(tmp_path, monkeypatch):
    def cases(config, device, dtype, sizes):
        def fail():
            raise ValueError("no such model")

        def make():
            return Made(
                {"torch": lambda: None, "auto": lambda: torch.zeros(1) / "x"}, {"torch": "torch", "auto": "auto"}
            )

        yield "built", fail
        yield "called", make

    monkeypatch.setattr(benchmark, "CASES", {"broken": cases})
    stopped = benchmark.measure_all(CPU, ["tiny"], tmp_path / "rows.json", TINY, until=0.0)
    assert stopped["left"] == ["broken, tiny, built", "broken, tiny, called"]
    built, called = benchmark.measure_all(CPU, ["tiny"], tmp_path / "rows.json", TINY)["rows"]
    assert built["failed"] == "ValueError: no such model"
    assert called["ways"]["auto"]["failed"].startswith("TypeError") and called["ways"]["torch"]["seconds"] > 0
    assert "no such model" in benchmark.table([built, called])


def test_ways_force_their_backend():
    seen = []
    note = lambda: seen.append(dispatch._forced)
    benchmark.measure_case(Made({"torch": note, "auto": note}, {"torch": "torch", "auto": "auto"}), CPU, 1)
    assert seen == ["torch", "torch", "auto", "auto", "torch", "auto", "torch", "auto"]


def test_decoding_step_is_one_of_the_model():
    model = dense_llama(LLAMAS["tiny"], CPU, torch.float32)
    decoder = Decoder(model, 2, 8, CPU)
    decoder.step()
    decoder.rewind()
    first = decoder.step()
    (keys, *_) = [layer.keys for layer in decoder.cache.layers]
    assert keys[:, :, 4].abs().min() > 0 and not keys[:, :, 5:].any()
    decoder.rewind()
    assert torch.equal(decoder.step(), first)
    assert {int(layer.cumulative_length) for layer in decoder.cache.layers} == {5}
    decoder.step()
    assert first.shape == (2, 1, 512) and decoder.cache.layers[0].keys[:, :, 5].any()
