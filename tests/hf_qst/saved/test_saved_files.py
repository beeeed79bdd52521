"""Files of an earlier state of the package load, and compute what they did when they were written.

`tests/saved_files` holds a folder for each released version, and for two days before the first, see `tests.version_folder`.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from hf_qst.base_model.packed_weights import unpacked
from hf_qst.version import __version__
from hf_qst_plugins.code_evaluation.samples_file import SamplesFile
from tests.version_folder import PARTS, SAVED, SETTINGS, STORAGES, load, loss_with_cache, read_tables

FOLDERS = sorted(SAVED.iterdir())
VERSIONS = [folder for folder in FOLDERS if (folder / "expected.json").exists()]
SAVED_PARTS = [
    (folder, name) for folder in FOLDERS for name in load_file(folder / "expected.safetensors") if name != "input_ids"
]


def label(value) -> str:
    return value.name if isinstance(value, Path) else value


def expected_of(folder: Path) -> dict:
    return json.loads((folder / "expected.json").read_text())


@pytest.mark.parametrize(("folder", "name"), SAVED_PARTS, ids=label)
def test_a_part_loads_and_computes_what_it_did(folder, name):
    expected = load_file(folder / "expected.safetensors")
    model = load(folder, name).eval()
    with torch.no_grad(), unpacked(model):
        logits = model(input_ids=expected["input_ids"], use_cache=False).logits
    torch.testing.assert_close(logits, expected[name], atol=1e-5, rtol=1e-5)
    if name != "base":
        assert (logits - expected["base"]).abs().max() > 1e-2


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("folder", VERSIONS, ids=label)
def test_stored_states_are_found_and_give_the_loss_they_did(folder, storage, tmp_path):
    states = shutil.copytree(folder / "hidden_states", tmp_path / "states")
    loss, counts = loss_with_cache(folder, storage, states)
    assert loss == pytest.approx(expected_of(folder)["losses"][storage], abs=1e-5)
    assert counts.damaged == 0
    # They are of a base's whole configuration, to which a version of transformers may add a field.
    written = json.loads((folder / "base" / "config.json").read_text())["transformers_version"]
    if transformers.__version__ == written:
        assert (counts.found, counts.missing) == (2, 0)


@pytest.mark.parametrize("folder", VERSIONS, ids=label)
def test_samples_and_tables_are_read_and_a_run_goes_on(folder, tmp_path):
    found = read_tables(folder)
    expected = expected_of(folder)
    assert found == {name: expected[name] for name in found}
    path = shutil.copy(folder / "samples.jsonl", tmp_path)
    with SamplesFile(path, SETTINGS) as file:
        assert file.samples == expected["samples"]


def test_this_version_has_its_folder_with_every_part():
    assert set(load_file(SAVED / __version__ / "expected.safetensors")) == {*PARTS, "input_ids"}
    assert (SAVED / __version__).resolve() in {folder.resolve() for folder in VERSIONS}
