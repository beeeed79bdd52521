"""The versions of other packages: the ranges that are declared, and what is said of one outside them."""

import configparser
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path

import pytest

from hf_qst.requirements import RANGES, check_versions

ROOT = Path(__file__).parents[2]


def test_the_ranges_are_those_of_the_installation():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    declared = settings["options"]["install_requires"].split()
    ours = {name: f"{name}>={least}" + (f",<{below}" if below else "") for name, (least, below) in RANGES.items()}
    assert set(ours.values()) <= set(declared)
    assert {line for line in declared if ",<" in line} <= set(ours.values())


@pytest.mark.parametrize("found", ["5.16.1", "4.57.0", "5.9", "5.16.0.dev0"])
def test_an_old_version_is_refused_in_one_line(found, monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: found)
    with pytest.raises(ImportError) as error:
        check_versions({"transformers": ("5.17", "5.24")})
    said = str(error.value)
    assert "\n" not in said and f"needs transformers>=5.17,<5.24, installed is transformers {found}" in said
    assert "pip install 'transformers>=5.17,<5.24'" in said


@pytest.mark.parametrize("found", ["5.24.0", "5.24.0.dev0", "6.0", "5.100.1+cpu"])
def test_a_newer_version_than_was_tried_gets_a_warning(found, monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: found)
    with pytest.warns(UserWarning) as said:
        check_versions({"transformers": ("5.17", "5.24")})
    (message,) = [str(one.message) for one in said]
    assert (
        f"was tried with transformers>=5.17,<5.24, installed is transformers {found}:" in message
        and "\n" not in message
    )


@pytest.mark.parametrize("found", ["5.17", "5.17.0rc1", "5.23.9", "5.20.2+local"])
def test_a_version_inside_the_range_is_not_mentioned(found, monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_versions({"transformers": ("5.17", "5.24")})


def test_the_versions_are_compared_before_names_of_other_packages_are_imported(tmp_path):
    """An old PEFT lacks names that this package imports: the error is the one that says so."""
    dist = tmp_path / "peft-0.12.0.dist-info"
    dist.mkdir()
    (dist / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.12.0\n")
    (tmp_path / "peft.py").write_text("raise AssertionError('peft was imported first')\n")
    path = ":".join([str(tmp_path), *filter(None, sys.path)])
    code = "import hf_qst"
    run = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": path}, capture_output=True, text=True)
    assert run.stderr.strip().splitlines()[-1].startswith("ImportError: hf_qst")
    assert "needs peft>=0.21,<0.22, installed is peft 0.12.0: pip install" in run.stderr
