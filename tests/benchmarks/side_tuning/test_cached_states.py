"""The benchmark of stored states compares equal things."""

import json

import pytest
import torch

from benchmarks.side_tuning import cached_states, cached_sweep
from benchmarks.side_tuning.tasks import Batch
from hf_qst import QSTConfig
from tests.architectures import tiny, token_batch

IDS = token_batch(2, 12)


@pytest.mark.parametrize("name", ["full", "narrow"])
def test_the_arithmetic_alone_takes_the_same_step(name):
    runs = [
        cached_states.make_run(cached_states.VARIANTS[name], tiny("llama"), [{"input_ids": IDS}], 0) for _ in range(2)
    ]
    arithmetic = cached_states.Arithmetic(runs[0], IDS)
    for _ in range(3):
        arithmetic.step()
        runs[1].step(IDS)
    for (key, ours), theirs in zip(runs[0].model.named_parameters(), runs[1].model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=key)


def test_a_result_has_what_the_table_shows(tmp_path, capsys):
    cached_states.main(
        [
            "--shape",
            "tiny",
            "--repeats",
            "1",
            "--batches",
            "2",
            "--variants",
            "full",
            "narrow-int8",
            "--output",
            str(tmp_path),
        ]
    )
    result = json.loads((tmp_path / "side_cached_tiny.json").read_text())
    rows = result["rows"]
    assert rows["full"]["bytes_per_token"] > 3 * rows["narrow-int8"]["bytes_per_token"]
    assert rows["full"]["largest_loss_difference"] < 1e-5
    assert 0 < rows["narrow-int8"]["largest_loss_error"] < 5e-3
    errors = [abs(row["error"]) for row in result["last_state"].values()]
    assert errors[0] == 0 < errors[3] < errors[2]
    text = capsys.readouterr().out
    assert "principal, no readout, int8" in text and "full: cached step / its arithmetic" in text


def test_the_sweeps_train_is_the_same_with_a_cache(tmp_path):
    batches = [Batch(ids, ids) for ids in token_batch(6, 12).split(2)]
    losses = []
    for folder in (None, str(tmp_path)):
        config = QSTConfig(task_type="CAUSAL_LM", r=4, hidden_state_cache=folder)
        losses.append(cached_sweep.train(tiny("llama"), config, 1e-2, batches[:2], batches[2:], epochs=3))
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[0] != pytest.approx(
        cached_sweep.train(tiny("llama"), config, 1e-9, batches[:2], batches[2:], 1), abs=1e-3
    )
