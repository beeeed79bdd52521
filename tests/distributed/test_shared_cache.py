"""One hidden-state cache for two processes: who writes what, who reads it, and that no number changes."""

import pytest
import torch

from hf_qst.errors import HiddenStateCacheError
from hf_qst.qst import HiddenStateCacheConfig, fill_hidden_state_cache, hidden_state_cache, set_hidden_state_cache
from tests.distributed.processes import in_processes
from tests.distributed.training import FSDP2, ROWS, STEPS, let_a_cpu_shard, losses_of, make, trainer
from tests.toy_data import token_dataset

UNSAVED = {"save_strategy": "no"}
EXAMPLES = ROWS * STEPS


def with_cache(folder):
    model = make("qst")
    set_hidden_state_cache(model, HiddenStateCacheConfig(str(folder), "full"))
    return model


def train(place, folder, steps: int = STEPS) -> dict:
    model = with_cache(folder)
    run = trainer("qst", model, place / "run", **UNSAVED, max_steps=steps)
    run.train()
    cache = hidden_state_cache(model)
    counts = {"found": cache.counts.found, "missing": cache.counts.missing, "damaged": cache.counts.damaged}
    cache.close()
    return {"losses": losses_of(run), **counts}


def fill(place, folder, rank_of_data: bool) -> dict:
    """Each process its part: of the trainer's loader, or every second batch of rows that all see."""
    model = with_cache(folder)
    if rank_of_data:
        rank = torch.distributed.get_rank()
        report = fill_hidden_state_cache(model, token_dataset(EXAMPLES), rank, 2, progress=False)
    else:
        loader = trainer("qst", model, place / "fill", **UNSAVED).get_train_dataloader()
        report = fill_hidden_state_cache(model, loader, progress=False)
    return {"stored": report.stored, "written": report.bytes_written}


def under_fsdp(place, folder) -> str:
    let_a_cpu_shard()
    run = trainer("qst", with_cache(folder), place / "fsdp", **UNSAVED, **FSDP2)
    try:
        run.train()
    except HiddenStateCacheError as error:
        return str(error)
    raise AssertionError("a divided base was cached")


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    run = trainer("qst", make("qst"), tmp_path_factory.mktemp("one"), **UNSAVED)
    run.train()
    return torch.tensor(losses_of(run))


def test_two_processes_fill_one_folder_while_they_train_and_read_it_again(tmp_path, losses):
    folder = tmp_path / "cache"
    first = in_processes(2, train, tmp_path / "first", tmp_path, folder)
    assert [found["missing"] for found in first] == [EXAMPLES // 2] * 2  # each writes the rows that it was given
    again = in_processes(2, train, tmp_path / "again", tmp_path, folder)
    assert [(found["found"], found["missing"]) for found in again] == [(EXAMPLES // 2, 0)] * 2
    alone = train(tmp_path, folder)  # one process finds what either of them has written
    assert (alone["found"], alone["missing"]) == (EXAMPLES, 0)
    for found in (*first, *again, alone):
        assert found["damaged"] == 0
        torch.testing.assert_close(torch.tensor(found["losses"]), losses, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rank_of_data", [False, True])
def test_filling_is_divided_among_processes(rank_of_data, tmp_path):
    folder = tmp_path / "cache"
    filled = in_processes(2, fill, tmp_path / "filled", tmp_path, folder, rank_of_data)
    assert [found["stored"] for found in filled] == [EXAMPLES // 2] * 2
    assert all(found["written"] for found in filled)
    assert [found["missing"] for found in in_processes(2, train, tmp_path / "trained", tmp_path, folder)] == [0, 0]


def test_a_divided_base_is_refused_in_all_processes(tmp_path):
    """One process would run the base for its rows while another, which found its own, does not."""
    for message in in_processes(2, under_fsdp, tmp_path / "fsdp", tmp_path, tmp_path / "cache"):
        assert "each process holds a part" in message and "FSDP" in message
