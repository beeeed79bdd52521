"""The notebooks run from top to bottom and show what their text says."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"


def run(name):
    """All that the notebook prints."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.get("text", "") for output in outputs if output.get("name") == "stdout")


@pytest.mark.slow
def test_side_tuning_lowers_the_perplexity_and_leaves_the_base():
    text = run("side_tuning")
    (before, after), (alone,) = (
        map(float, re.search(pattern, text).groups())
        for pattern in (r"perplexity ([\d.]+) before, ([\d.]+) after", r"without the side network: ([\d.]+)")
    )
    assert after < before == alone


@pytest.mark.slow
def test_smaller_models_are_smaller():
    rows = re.findall(
        r"^(\w[\w ]*?) +([\d,]+) parameters +([\d.]+) MiB +perplexity +([\d.]+)$", run("smaller_models"), re.M
    )
    parameters = {name: int(count.replace(",", "")) for name, count, _, _ in rows}
    size = {name: float(mib) for name, _, mib, _ in rows}
    assert rows[0][0] == "dense" and len(rows) == 4
    assert parameters["pruned"] < parameters["dense"] > parameters["low rank"]
    assert size["4 bits"] < size["pruned"]
