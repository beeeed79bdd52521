"""A tiny model and its text as files, and the command line in this process."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hf_qst_plugins.command_line.__main__ import main
from hf_qst_plugins.command_line.record import RECORD_NAME
from tests.architectures import tiny
from tests.toy_data import text_dataset, tokenizer

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A folder with `model`, `text.jsonl` and `other.jsonl`."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny("llama").save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    for name, seed in (("text", 0), ("other", 7)):
        rows = [json.dumps(row) for row in text_dataset(120, seed)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def on_model(inputs):
    """Options that name the model and its text."""
    return ["--model", str(inputs / "model"), "--data", str(inputs / "text.jsonl"), "--max_length", "16"]


@pytest.fixture
def hf_qst_command(capsys):
    """Runs a command; returns (exit code, stdout, stderr)."""

    def run(*argv):
        code = main([str(part) for part in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def record_of(folder) -> dict:
    return json.loads((Path(folder) / RECORD_NAME).read_text())


def process(*argv, **arguments) -> subprocess.Popen:
    """`python -m hf_qst_plugins.command_line ...` as a process of its own."""
    places = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "plugins"), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-m", "hf_qst_plugins.command_line", *map(str, argv)],
        # One thread, as in the tests themselves: with two, sums have another order and other last bits.
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore the interrupt, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **arguments,
    )
