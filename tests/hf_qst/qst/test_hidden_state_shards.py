"""The files of a hidden-state cache: several writers, killed writers, full disks, damage."""

import gc
import logging
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch

from hf_qst.qst.hidden_states.shards import Counts, Shards, folder_bytes
from tests.child_processes import CHILD

PARTS = ("state.1", "state.1.scales")


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def example(number: int, width: int = 16) -> dict[str, torch.Tensor]:
    """Of 3 to 7 tokens, other ones for each number."""
    generator = torch.Generator().manual_seed(number)
    tokens = 3 + number % 5
    values = torch.randint(-127, 128, (tokens, width), generator=generator, dtype=torch.int8)
    return {PARTS[0]: values, PARTS[1]: torch.rand(tokens, 1, generator=generator)}


def opened(folder: Path, limit=None, shard_bytes=1 << 20) -> Shards:
    return Shards(folder / "states", folder, limit, PARTS, Counts(), shard_bytes)


def filled(folder: Path, numbers, **settings) -> Shards:
    shards = opened(folder, **settings)
    for number in numbers:
        shards.writer.put(key(number), example(number))
    shards.writer.flush()
    return shards


def equal(got, number: int) -> bool:
    return all(torch.equal(got[name], part) for name, part in example(number).items())


def in_child(function, *arguments, processes=CHILD) -> int:
    """The exit code of a process that runs `function`."""
    child = processes.Process(target=function, args=arguments)
    child.start()
    child.join(60)
    return child.exitcode


def test_examples_come_back_and_others_do_not(tmp_path):
    shards = filled(tmp_path, range(20), shard_bytes=300)
    assert len(list((tmp_path / "states").glob("*.safetensors"))) > 3
    for reader in (shards, opened(tmp_path)):
        assert all(equal(reader.get(key(n)), n) for n in range(20))
        assert reader.get(key(20)) is None
        assert len(reader) == 20
    assert shards.counts.stored == 20
    assert shards.counts.bytes_written == folder_bytes(tmp_path)


def test_waiting_examples_are_found_and_written_when_the_object_goes(tmp_path):
    shards = opened(tmp_path)
    shards.writer.put(key(1), example(1))
    assert equal(shards.get(key(1)), 1)
    assert not list((tmp_path / "states").iterdir())
    del shards
    gc.collect()
    assert equal(opened(tmp_path).get(key(1)), 1)


def test_a_forked_process_leaves_what_waits_to_its_parent(tmp_path):
    shards = opened(tmp_path)
    shards.writer.put(key(1), example(1))
    assert in_child(shards.writer.flush, processes=multiprocessing.get_context("fork")) == 0
    assert not list((tmp_path / "states").iterdir())
    shards.writer.flush()
    assert len(list((tmp_path / "states").iterdir())) == 1


def test_two_processes_write_and_find_what_the_other_wrote(tmp_path):
    reader = opened(tmp_path)
    children = [
        CHILD.Process(target=filled, args=(tmp_path, range(first, 200, 2)), kwargs={"shard_bytes": 500})
        for first in (0, 1)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert all(equal(reader.get(key(n)), n) for n in range(200))
    assert reader.counts == Counts()


def test_the_same_example_from_two_processes_is_harmless(tmp_path):
    filled(tmp_path, range(4))
    filled(tmp_path, range(2, 6))
    reader = opened(tmp_path)
    assert all(equal(reader.get(key(n)), n) for n in range(6))
    assert len(reader) == 6


def _write_large(folder: Path) -> None:
    shards = opened(folder, shard_bytes=1)
    for number in range(1000):
        shards.writer.put(
            key(number), {PARTS[0]: torch.ones(4000, 4000, dtype=torch.int8), PARTS[1]: torch.ones(4000, 1)}
        )


def test_a_writer_that_is_killed_leaves_whole_shards_alone(tmp_path):
    child = CHILD.Process(target=_write_large, args=(tmp_path,))
    child.start()
    folder, deadline = tmp_path / "states", time.monotonic() + 60
    # Some shards are there and the next is being written.
    while len(list(folder.glob("[!.]*.safetensors"))) < 2 or not list(folder.glob(".tmp_*")):
        assert time.monotonic() < deadline and child.is_alive()
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    leftover = list(folder.glob(".tmp_*"))
    reader = opened(tmp_path)
    assert len(reader) >= 2
    assert all(reader.get(key(n))[PARTS[0]].bool().all() for n in range(len(reader)))
    assert reader.counts.damaged == 0
    for path in leftover:
        os.utime(path, (0, 0))
    opened(tmp_path)
    assert not list(folder.glob(".tmp_*"))


def _fill_a_full_disk(folder: Path, before: int, after: int) -> None:
    records = []
    logging.getLogger("hf_qst").addHandler(type("Keep", (logging.Handler,), {"emit": lambda _, r: records.append(r)})())
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    shards = opened(folder)
    for number in range(before, after):
        shards.writer.put(key(number), example(number, width=4096))
        shards.writer.flush()
    assert not shards.writer.accepts
    assert equal(shards.get(key(0)), 0)
    assert [record.levelname for record in records] == ["WARNING"], records
    assert "File too large" in records[0].getMessage()
    assert not shards.writer.waiting


def test_a_full_disk_ends_the_writing_with_one_warning(tmp_path):
    filled(tmp_path, range(3))
    before = set((tmp_path / "states").iterdir())
    assert in_child(_fill_a_full_disk, tmp_path, 4, 12) == 0
    new = set((tmp_path / "states").iterdir()) - before
    assert all(path.stat().st_size <= 20_000 and not path.name.startswith(".tmp_") for path in new)


def test_the_size_limit_is_kept_and_said_once(tmp_path, caplog):
    limit = 20_000
    shards = filled(tmp_path, range(500), limit=limit, shard_bytes=2000)
    assert limit / 2 < folder_bytes(tmp_path) <= limit
    assert caplog.text.count("size_limit of 20,000 bytes") == len(caplog.records) == 1
    stored = shards.counts.stored
    assert 0 < stored < 500
    assert all(equal(shards.get(key(n)), n) for n in range(stored))
    assert shards.get(key(499)) is None
    # Another folder of states below the same root counts as well.
    assert filled(tmp_path, range(1000, 1100), limit=limit).counts.stored == 0


def test_no_flipped_bit_gives_wrong_states(tmp_path):
    filled(tmp_path, range(8))
    (path,) = (tmp_path / "states").glob("*.safetensors")
    whole = path.read_bytes()
    damaged = 0
    for place in range(0, len(whole), 61):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        reader = opened(tmp_path)
        got = [reader.get(key(n)) for n in range(8)]
        assert all(parts is None or equal(parts, n) for n, parts in enumerate(got)), place
        # A bit of the header's blanks changes nothing; of an example's key, it is another's and never asked for.
        damaged += reader.counts.damaged > 0
        assert None in got or place < 1000
    assert damaged > 10


@pytest.mark.parametrize("content", [b"", b"no safetensors", None])
def test_a_broken_shard_is_computed_again(tmp_path, content, caplog):
    filled(tmp_path, range(8))
    (path,) = (tmp_path / "states").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-10] if content is None else content)
    reader = opened(tmp_path)
    assert reader.get(key(0)) is None
    assert reader.counts.damaged == 1
    assert "will be computed again" in caplog.text and str(path) in caplog.text
    reader.writer.put(key(0), example(0))
    reader.writer.flush()
    for shards in (reader, opened(tmp_path)):
        assert equal(shards.get(key(0)), 0)


def test_a_damaged_example_is_stored_again_beside_the_others(tmp_path):
    filled(tmp_path, range(2))
    (path,) = (tmp_path / "states").glob("*.safetensors")
    whole = path.read_bytes()
    first = example(0)[PARTS[0]].numpy().tobytes()
    at = whole.index(first)
    path.write_bytes(whole[:at] + bytes(len(first)) + whole[at + len(first) :])
    for _ in range(2):
        reader = opened(tmp_path)
        assert equal(reader.get(key(1)), 1)
        if reader.get(key(0)) is None:
            assert reader.counts.damaged == 1
            reader.writer.put(key(0), example(0))
            reader.writer.flush()
        assert equal(reader.get(key(0)), 0)
