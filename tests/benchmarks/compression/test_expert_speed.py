"""The batched forms compute what the experts of a compressed layer compute one by one."""

import json

import pytest
import torch

from benchmarks.compression import expert_speed


@pytest.mark.parametrize("form", expert_speed.BATCHED)
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_batched_forms_agree_with_one_by_one(form, tokens):
    torch.manual_seed(0)
    cpu, dtype = torch.device("cpu"), torch.float32
    experts = expert_speed.compressed(256, 96, 6, cpu, dtype)
    ranks = {layer.rank for index in range(6) for layer in experts[index].children()}
    assert len(ranks) > 2
    given = expert_speed.routed(tokens, experts, 2, cpu, dtype)
    found = expert_speed.BATCHED[form](expert_speed.stacked(experts), *given)
    expected = experts(*given)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_the_committed_figures_are_of_forms_that_agree():
    found = json.loads(expert_speed.RESULT.read_text())
    assert list(found["tokens"]) == [str(count) for count in expert_speed.TOKENS]
    for rows in found["tokens"].values():
        assert all(row["error"] < 1e-4 and row["ms"] > 0 for row in rows.values())


def test_it_runs(tmp_path, capsys):
    sizes = [
        "--hidden",
        "256",
        "--middle",
        "96",
        "--experts",
        "4",
        "--top-k",
        "2",
        "--rounds",
        "2",
        "--tokens",
        "3",
        "9",
    ]
    expert_speed.main([*sizes, "--output", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["layer"]["experts"] == 4 and set(found["tokens"]) == {"3", "9"}
    assert "gathered" in found["tokens"]["3"] and "gathered" not in found["tokens"]["9"]
    assert "| 9 |" in capsys.readouterr().out
