"""Packages that only a part of hf_qst needs: where they are imported, and what is said without them."""

import ast
import configparser
import sys
from pathlib import Path

import pytest

from hf_qst import extras

ROOT = Path(__file__).parents[2]
SETTINGS = configparser.ConfigParser()
SETTINGS.read(ROOT / "setup.cfg")
# Triton is looked for by the kernels' dispatch, which has another way without it; vLLM loads its adapter itself, and its
# base classes are imported by the user's module.
ELSEWHERE = {"triton", "vllm"}


def names_of(requirements):
    """Import names: a hyphen of a distribution is an underscore there."""
    return {line.split(">")[0].split("[")[0].strip().replace("-", "_") for line in requirements.strip().splitlines()}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def test_every_import_is_required_or_has_an_extra():
    files = [path for root in ("hf_qst", "kernels", "plugins") for path in (ROOT / root).rglob("*.py")]
    found = {name for path in files for name in imported(path)} - sys.stdlib_module_names
    found -= {"hf_qst", "hf_qst_kernels", "hf_qst_plugins", *ELSEWHERE}
    required = names_of(SETTINGS["options"]["install_requires"]) | {
        "huggingface_hub",
        "numpy",
        "yaml",
    }  # transformers requires these
    assert found <= required | set(extras.EXTRAS)
    assert set(extras.EXTRAS) <= found


@pytest.mark.parametrize(("package", "extra"), extras.EXTRAS.items())
def test_error_names_the_extra_that_brings_the_package(package, extra, monkeypatch):
    assert package in names_of(SETTINGS["options.extras_require"][extra])
    if package != "lm_eval":  # the others are in the environment of the tests
        extras.require(package, "this")
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(ImportError) as raised:
        extras.require(package, "this")
    assert str(raised.value) == f"this needs {package}: pip install 'hf_qst[{extra}]'"
