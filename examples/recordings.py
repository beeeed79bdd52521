"""Runs the commands of `docs/recordings.md` on the project's own small model and writes what they print into the page.

    python -m examples.recordings        # some minutes on two cores, a quarter of an hour on busy ones

A line that begins with `$ ` is a command. The model is `base_model`, the texts are `prose` (this project's pages) and `code`
(its examples), in a new folder.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from hf_qst.saved import write_text

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "recordings.md"
_BLOCK = re.compile(r"^```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"^\$ (.*?[^\\])$", re.MULTILINE | re.DOTALL)
_BAR = re.compile(r"\d+%\||it/s|examples/s|batch/s")


def commands(text: str) -> list[list[str]]:
    """The commands in a text, without `hf-qst`."""
    found = [shlex.split(command.replace("\\\n", " ")) for command in _COMMAND.findall(text)]
    assert all(command[0] == "hf-qst" for command in found), found
    return [command[1:] for command in found]


def prepare(folder: Path) -> None:
    """Put the model and the texts into a folder."""
    shutil.copytree(ROOT / "examples" / "base_model", folder / "base_model")
    for name, source, suffix in (("prose", "docs", ".md"), ("code", "examples", ".py")):
        (folder / name).mkdir()
        for path in sorted((ROOT / source).glob(f"*{suffix}")):
            if path != PAGE:
                shutil.copy(path, folder / name)


def printed(command: list[str], folder: Path) -> str:
    """What a command prints in a folder, without the bars of progress, and its exit code if that is not 0."""
    places = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "plugins"), os.environ.get("PYTHONPATH", "")]
    ended = subprocess.run(
        [sys.executable, "-m", "hf_qst_plugins.command_line", *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = [line for part in ended.stdout.split("\n") for line in part.split("\r")[-1:] if not _BAR.search(line)]
    text = "\n".join(line.rstrip() for line in lines).strip("\n")
    code = f"\n[exit code {ended.returncode}]" if ended.returncode else ""
    return re.sub(r"\n{3,}", "\n\n", text) + code


def record(text: str, folder: Path, only: str = "") -> str:
    """A page with the output of its commands; those without the text `only` keep what is there."""

    def run(found: re.Match) -> str:
        _, *pieces = _COMMAND.split(found[1])
        parts = []
        for written, output in zip(pieces[::2], pieces[1::2], strict=True):
            if only in written:
                print(written, flush=True)
                (command,) = commands(f"$ {written}\n")
                output = printed(command, folder)
            parts.append(f"$ {written}\n{output.strip(chr(10))}")
        return "```text\n" + "\n\n".join(parts) + "\n```"

    return _BLOCK.sub(run, text)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.recordings", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--only", default="", metavar="TEXT", help="run the commands with this text in them alone")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        write_text(args.page, record(args.page.read_text(encoding="utf-8"), Path(folder), args.only))


if __name__ == "__main__":
    main()
