"""The public names have types that a checker of a user's program sees."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hf_qst

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("public_api.py")


@pytest.mark.slow
def test_mypy_accepts_a_program_and_finds_its_mistakes(tmp_path):
    """Strict, with the mistakes marked: a mark without its mistake is an error too."""
    assert importlib.util.find_spec("mypy"), "mypy is in the extra `test`"
    run = [sys.executable, "-m", "mypy", "--strict", "--explicit-package-bases", "--cache-dir", tmp_path, PROGRAM]
    roots = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "plugins")))
    checked = subprocess.run(
        [*run, "--follow-imports", "silent"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": roots},
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_program_uses_every_public_name():
    text = PROGRAM.read_text()
    assert not [name for name in hf_qst.__all__ if name not in text]
