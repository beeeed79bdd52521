"""Every public name is in the API reference."""

import re
from pathlib import Path

import pytest

import hf_qst
import hf_qst.errors

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
SHOWN = {
    name.rpartition(".")[2]
    for page in REFERENCE.glob("*.md")
    for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE)
}


@pytest.mark.parametrize("package", [hf_qst, hf_qst.errors], ids=lambda package: package.__name__)
def test_public_names_have_an_entry(package):
    assert {name for name in package.__all__ if not name.startswith("_")} <= SHOWN
