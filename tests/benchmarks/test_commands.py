"""Every command that the docs name exists with its options, and every result file that they name is there."""

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = [*(ROOT / "docs").rglob("*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile"))]
SOURCES = [
    path
    for folder in ("benchmarks", "examples", "hf_qst", "kernels", "plugins")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".md") and "results" not in path.parts
]
COMMAND = re.compile(r"python\)? -m ((?:benchmarks|examples)\b[\w.]*)([^`|#\n\"]*)")
RESULT = re.compile(
    r"(?:benchmarks/results/)?\b"
    r"((?:measured/|kernels_|compression|pruning|side_|decoding)[\w/-]*\.(?:json|png)|kernels_[\w-]*\.md)"
)


def commands():
    """Module -> options with which it is named anywhere."""
    found = {}
    for path in (*DOCS, *SOURCES):
        for module, rest in COMMAND.findall(path.read_text()):
            found.setdefault(module.rstrip("."), set()).update(re.findall(r"--[a-z][a-z0-9-]+", rest))
    return found


@pytest.mark.parametrize(("module", "options"), sorted(commands().items()))
def test_command_exists_with_its_options(module, options, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert ended.value.code == 0
    known = set(re.findall(r"--[a-z][a-z0-9-]+", capsys.readouterr().out))
    assert options <= known, options - known


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_result_files_exist(path):
    for name in RESULT.findall(path.read_text()):
        places = [
            ROOT / "benchmarks" / "results" / name,
            path.parent / name,
            ROOT / "kernels" / "hf_qst_kernels" / name,
        ]
        assert any(place.exists() for place in places), name
