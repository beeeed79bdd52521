"""The side-tuning benchmark on a tiny shape: its bases, its rows, its file."""

import json

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from benchmarks.common.timing import paired_ratio
from benchmarks.side_tuning import __main__ as side_tuning
from benchmarks.side_tuning.bases import SHAPES, copy_of, random_base, random_tokens
from benchmarks.side_tuning.losses import at_seconds
from benchmarks.side_tuning.methods import METHODS, Run
from benchmarks.side_tuning.report import table
from hf_qst.base_model import forbid_packing

CPU = torch.device("cpu")
TINY = SHAPES["tiny"].config


@pytest.fixture(scope="module")
def base():
    made = random_base(TINY, CPU)
    forbid_packing(made)
    return made


def test_random_base_is_nf4_double_quantised_but_for_embeddings_and_head(base):
    quantized = [part for part in base.modules() if isinstance(part, bnb.nn.Linear4bit)]
    assert len(quantized) == 7 * TINY["num_hidden_layers"]
    assert not any(type(part) is nn.Linear for part in base.model.modules())
    for part in quantized:
        state = part.weight.quant_state
        assert (state.quant_type, state.nested, state.blocksize) == ("nf4", True, 64)
        assert part.weight.dtype == torch.uint8
        assert part.weight.numel() == part.in_features * part.out_features // 2
    assert not any(p.is_meta for p in [*base.parameters(), *base.buffers()])
    assert not any(p.requires_grad for p in base.parameters())
    assert base.lm_head.weight.dtype == torch.float32


def test_random_base_runs_and_is_the_same_for_a_seed(base):
    ids = random_tokens(TINY["vocab_size"], 2, 8)
    with torch.no_grad():
        first = base(input_ids=ids).logits
        again = random_base(TINY, CPU)
        forbid_packing(again)
        second = again(input_ids=ids).logits
        other = random_base(TINY, CPU, seed=1)
        forbid_packing(other)
        third = other(input_ids=ids).logits
    assert first.isfinite().all()
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_copies_share_weights_and_no_modules(base):
    copy = copy_of(base)
    for (name, one), other in zip(base.named_parameters(), copy.parameters(), strict=True):
        assert one.data_ptr() == other.data_ptr(), name
    assert not set(base.modules()) & set(copy.modules())
    own = copy_of(base, own_quantized=True)
    for (name, one), other in zip(base.named_parameters(), own.named_parameters(), strict=True):
        other = other[1]
        assert (one.data_ptr() == other.data_ptr()) == (not isinstance(one, bnb.nn.Params4bit)), name
    ids = random_tokens(TINY["vocab_size"], 1, 8)
    with torch.no_grad():
        assert torch.equal(base(input_ids=ids).logits, own(input_ids=ids).logits)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "qst-paper"])
def test_every_method_trains_its_adapter_and_nothing_else(base, name):
    before = {key: value.clone() for key, value in base.state_dict().items()}
    ids = random_tokens(TINY["vocab_size"], 2, 16)
    run = Run(METHODS[name], copy_of(base), CPU, [{"input_ids": ids}], lr=1e-2)
    first = run.loss(ids).item()
    for _ in range(8):
        run.step(ids)
    assert run.loss(ids).item() < first
    assert run.count() == sum(p.numel() for p in run.model.parameters() if p.requires_grad) > 0
    assert run.file_bytes() >= 4 * run.count()
    after = base.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_saved_bytes_order_the_methods(base):
    ids = random_tokens(TINY["vocab_size"], 2, 32)
    saved = {}
    for name in ("qst-recompute", "qst", "qst-no-recompute", "qlora-ckpt", "qlora"):
        run = Run(METHODS[name], copy_of(base), CPU, [])
        saved[name] = {head: run.saved_bytes(ids, head=head) for head in (True, False)}
        for counts in saved[name].values():
            assert 0 < counts["forward"] <= counts["peak"]
        assert all(p.grad is None for p in run.model.parameters())
    logits = 2 * 32 * TINY["vocab_size"] * 4
    for head in (True, False):
        order = [saved[name][head]["peak"] for name in saved]
        assert order == sorted(set(order))
    assert saved["qlora"][True]["peak"] - saved["qlora"][False]["peak"] >= logits
    assert saved["qst"][True]["peak"] - saved["qst"][False]["peak"] < logits


def test_a_run_writes_table_json_and_plot(tmp_path, capsys):
    argv = [
        "--shape",
        "tiny",
        "--methods",
        "qst",
        "qst-avgpool",
        "qst-paper",
        "qlora",
        "--repeats",
        "3",
    ]
    side_tuning.main([*argv, "--no-rss", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "side_tuning_tiny.json").read_text())
    assert (tmp_path / "side_tuning_tiny_memory.png").stat().st_size > 1000
    assert {"torch", "transformers", "peft", "bitsandbytes", "python"} <= set(result["versions"])
    assert {"commit", "machine", "arguments", "parameters", "rows", "times", "targets"} <= set(result)
    rows = result["rows"]
    for name in ("forward", "floor", "qst", "qst-avgpool", "qlora"):
        assert rows[name]["step_seconds"] > 0
    assert rows["qst-paper"]["error"].startswith("ValueError: QSTConfig.r=16")  # too narrow for 16 of its heads
    assert len(result["times"]["qst"]) == 3
    printed = capsys.readouterr().out
    assert table(result) in printed
    assert "QST, paper's settings did not run" in printed


def test_a_shape_for_the_gpu_is_refused_on_the_cpu(capsys):
    with pytest.raises(SystemExit):
        side_tuning.main(["--shape", "llama-3-8b"])
    assert "--shape llama-3-8b needs --device cuda" in capsys.readouterr().err


def test_ratios_are_taken_within_rounds():
    # The machine is twice as slow in the second round; the third is not shared.
    assert paired_ratio({"a": [2.0, 4.0, 9.0], "b": [1.0, 2.0]}, "a", "b") == 2.0
    assert paired_ratio({"a": [2.0]}, "a", "b") is None


def test_loss_at_a_time_lies_on_the_line_between_points():
    points = [(0, 0.0, 4.0), (10, 2.0, 3.0), (20, 6.0, 1.0)]
    assert at_seconds(points, 1.0) == 3.5
    assert at_seconds(points, 3.0) == 2.5
    assert at_seconds(points, 6.0) == 1.0
    assert at_seconds(points, 6.1) is None
