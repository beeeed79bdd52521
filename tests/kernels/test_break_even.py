"""Where a measured table lets a Triton kernel run, and what becomes of a table that is broken."""

import json
import logging
from pathlib import Path

import pytest
import torch

from hf_qst_kernels import break_even, dispatch

ENTRY = {
    "dtype": "bfloat16",
    "sizes": {"rows": 8, "inputs": 4096, "outputs": 4096},
    "triton_us": 4.0,
    "library_us": 6.0,
    "configuration": {"BLOCK_M": 16, "num_warps": 4},
}
TABLE = {"format": 1, "chip": "nvidia_h200", "versions": {}, "decisions": {"linear_index_add": [ENTRY]}}


class CudaTensor:
    """What the rule reads of a tensor."""

    is_cuda = True
    device = torch.device("cuda", 0)
    dtype = torch.bfloat16


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder of tables for a device that is called an H200."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(dispatch, "_triton_importable", lambda: True)
    monkeypatch.setattr(break_even, "SHIPPED", tmp_path / "shipped")
    forget()
    yield tmp_path / "hf_qst" / "kernels"
    forget()


def forget():
    break_even._tables.cache_clear()
    break_even._nearest.cache_clear()
    dispatch._say_once_if_unmeasured.cache_clear()


def write(folder, table=TABLE):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nvidia_h200.json").write_text(table if isinstance(table, str) else json.dumps(table))


def sizes(rows, inputs=4096, outputs=4096):
    return {"rows": rows, "inputs": inputs, "outputs": outputs}


def test_without_a_table_the_library_runs_and_says_so_once(cache, caplog):
    with caplog.at_level(logging.INFO, logger="hf_qst_kernels.dispatch"):
        for rows in (1, 8):
            assert not dispatch.runs_triton("linear_index_add", CudaTensor(), sizes(rows))
    assert len(caplog.records) == 1 and "no kernel measurements for NVIDIA H200" in caplog.text


def test_kernel_runs_near_where_it_won(cache):
    write(cache)
    for near in (sizes(8), sizes(4), sizes(16, 8192, 2048)):
        assert dispatch.runs_triton("linear_index_add", CudaTensor(), near)
    for far in (sizes(1), sizes(17), sizes(8, 1024), {"rows": 8, "dim": 4096}):
        assert not dispatch.runs_triton("linear_index_add", CudaTensor(), far)
    assert not dispatch.runs_triton("norm_gate", CudaTensor(), sizes(8))


def test_nearest_measurement_decides(cache):
    lost = {**ENTRY, "sizes": sizes(12), "triton_us": 9.0}
    write(cache, {**TABLE, "decisions": {"linear_index_add": [ENTRY, lost]}})
    assert dispatch.runs_triton("linear_index_add", CudaTensor(), sizes(9))
    assert not dispatch.runs_triton("linear_index_add", CudaTensor(), sizes(11))


def test_other_dtypes_are_not_spoken_for(cache):
    write(cache)

    class Half(CudaTensor):
        dtype = torch.float16

    assert not dispatch.runs_triton("linear_index_add", Half(), sizes(8))


def test_a_users_table_stands_before_the_shipped_one(cache, tmp_path, monkeypatch):
    shipped = tmp_path / "shipped"
    monkeypatch.setattr(break_even, "SHIPPED", shipped)
    other = {"norm_gate": [ENTRY]}
    write(shipped, {**TABLE, "decisions": {"linear_index_add": [{**ENTRY, "library_us": 1.0}], **other}})
    write(cache)
    assert dispatch.runs_triton("linear_index_add", CudaTensor(), sizes(8))
    assert dispatch.runs_triton("norm_gate", CudaTensor(), sizes(8))


def test_measured_configuration_is_launched(cache):
    write(cache)
    default = {"BLOCK_M": 64, "num_warps": 8}
    assert dispatch.configuration("linear_index_add", CudaTensor(), sizes(8), default) == ENTRY["configuration"]
    assert dispatch.configuration("linear_index_add", CudaTensor(), sizes(64), default) == default
    with dispatch.use_configuration("linear_index_add", {"BLOCK_M": 32}):
        assert dispatch.configuration("linear_index_add", CudaTensor(), sizes(8), default) == {"BLOCK_M": 32}
    with dispatch.use_configuration("linear_index_add", None):
        assert not dispatch.runs_triton("linear_index_add", CudaTensor(), sizes(8))
        assert dispatch.runs_triton("quantize_taps", CudaTensor())
    assert dispatch.runs_triton("linear_index_add", CudaTensor(), sizes(8))
    with pytest.raises(break_even.KernelTableError, match=r"must have the fields \('BLOCK_N',\), got .*BLOCK_M"):
        dispatch.configuration("linear_index_add", CudaTensor(), sizes(8), {"BLOCK_N": 64})


def entry(**changed):
    return {**TABLE, "decisions": {"linear_index_add": [{**ENTRY, **changed}]}}


@pytest.mark.parametrize(
    ("table", "found"),
    [
        ("{", "Expecting property name"),
        ("[]", "format must be 1, got 'list'"),
        ({**TABLE, "format": 2}, "format must be 1, got 2"),
        ({**TABLE, "chip": "nvidia_a100"}, "chip must be 'nvidia_h200', got 'nvidia_a100'"),
        ({**TABLE, "decisions": {"linear_index_add": ENTRY}}, "decisions must be an object of lists"),
        (entry(extra=1), "must have the fields"),
        (entry(dtype=16), "dtype in 'linear_index_add' must be a string, got 16"),
        (entry(sizes={"rows": 0}), "sizes in 'linear_index_add' must hold integers >= 1"),
        (entry(configuration={"BLOCK_M": True}), "configuration in 'linear_index_add' must hold integers"),
        (entry(triton_us=-1.0), "triton_us in 'linear_index_add' must be a number > 0, got -1.0"),
        (entry(library_us="6"), "library_us in 'linear_index_add' must be a number > 0, got '6'"),
    ],
)
def test_broken_table_is_one_clear_error(cache, table, found):
    write(cache, table)
    with pytest.raises(break_even.KernelTableError, match=found) as caught:
        dispatch.runs_triton("linear_index_add", CudaTensor(), sizes(8))
    assert "nvidia_h200.json" in str(caught.value) and "--tune" in str(caught.value)


def test_shipped_tables_are_valid():
    for path in break_even.SHIPPED.glob("*.json"):
        assert break_even.read_table(path, path.stem)


def test_user_folder_without_the_variable(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert break_even.user_folder() == Path.home() / ".cache" / "hf_qst" / "kernels"
