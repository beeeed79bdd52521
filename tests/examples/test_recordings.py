"""The page of recordings: every command is there, its options exist, and the script writes what commands print."""

from importlib import import_module

import pytest

from examples import recordings
from hf_qst_plugins.command_line.__main__ import COMMANDS
from hf_qst_plugins.command_line.arguments import Arguments

TEXT = """# Page

```text
$ hf-qst models \\
    --model_type llama
old output

$ hf-qst models --model_type nothing
```
"""


def test_every_command_is_recorded_with_options_that_exist():
    found = recordings.commands(recordings.PAGE.read_text())
    assert {name for name, *_ in found} == set(COMMANDS)
    for name, *argv in found:
        arguments = Arguments(name, "")
        arguments.flag("dry_run", "")
        import_module(f"hf_qst_plugins.command_line.{name.replace('-', '_')}").add_arguments(arguments)
        arguments.parse(argv)


def test_every_recorded_command_has_its_output():
    for block in recordings._BLOCK.findall(recordings.PAGE.read_text()):
        pieces = recordings._COMMAND.split(block)
        # Text before the first command, then a command and what follows it, in turn.
        assert not pieces[0].strip() and all(output.strip() for output in pieces[2::2])


@pytest.mark.slow
def test_output_is_written_below_its_command(tmp_path):
    written = recordings.record(TEXT, tmp_path)
    assert "old output" not in written and written.startswith("# Page\n\n```text\n$ hf-qst models \\\n    --model_type")
    assert "\nllama  qst: yes; disp: yes; mixed_rank: yes\n\n$ hf-qst models --model_type nothing\n" in written
    assert recordings.record(written, tmp_path, only="hf-qst nothing") == written
    assert written.endswith("[exit code 2]\n```\n") and "--model_type: the type 'nothing' is not known" in written
