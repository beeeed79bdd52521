"""`kill -9` in the middle of each command: the same command, begun again, ends with the files of one that was not killed."""

import random
import shutil
import time
from pathlib import Path

import pytest

from hf_qst.saved.whole_files import is_empty
from hf_qst_plugins.command_line.__main__ import main
from hf_qst_plugins.command_line.folders import last_checkpoint
from tests.architectures import tiny
from tests.damage.test_killed import killed, kills  # noqa: F401
from tests.toy_data import text_dataset, tokenizer

TRAINING = [
    "--max_steps",
    "6",
    "--save_steps",
    "1",
    "--per_device_train_batch_size",
    "2",
    "--use_cpu",
    "--save_strategy",
]
COMMANDS = {
    "finetune": ["--quantization", "null", *TRAINING, "steps"],
    "prune": ["--keep_ratio", "0.5", *TRAINING, "steps"],
    "prune by scores": ["--keep_ratio", "0.5", "--method", "flap"],
    "compress": ["--keep_ratio", "0.5"],
    "compress from disk": ["--keep_ratio", "0.5", "--from_disk"],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Options that name a tiny model and its text."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny("llama").save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    rows = [f'{{"text": "{row["text"]}"}}' for row in text_dataset(60, 0)]
    (folder / "text.jsonl").write_text("\n".join(rows) + "\n")
    return ["--model", str(folder / "model"), "--data", str(folder / "text.jsonl"), "--max_length", "16"]


def weights(folder: Path) -> dict[str, bytes]:
    """The files of the result, without checkpoints and the report, whose seconds differ."""
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_begun_again_ends_with_the_same_weights(name, kills, inputs, tmp_path):  # noqa: F811
    def argv(folder, *more):
        return [name.split()[0], *inputs, *COMMANDS[name], "--output_dir", str(folder), *more]

    started = time.perf_counter()
    assert main(argv(tmp_path / "whole")) == 0
    seconds = time.perf_counter() - started
    expected = weights(tmp_path / "whole")
    assert expected
    trains = name in ("finetune", "prune")
    if trains:  # one that was killed after its last step
        assert main(argv(tmp_path / "whole", "--resume")) == 0
        assert weights(tmp_path / "whole") == expected
    for kill in range(max(1, kills // 6)):
        folder = tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)
        killed(main, argv(folder), draw=random.Random(f"{name} {kill}"), longest=seconds)
        again = [] if not folder.exists() or is_empty(folder) else ["--overwrite"]
        if trains and folder.exists() and last_checkpoint(folder):
            again = ["--resume"]
        assert main(argv(folder, *again)) == 0, (kill, again)
        assert weights(folder) == expected, (kill, again)
        unfinished = ".new_" if "disk" in name else "."  # factors that a killed process had on disk stay for an hour
        assert not [path for path in folder.rglob("*") if path.name.startswith(unfinished)], (kill, again)


def test_a_cache_whose_filling_was_killed_is_filled_up(kills, inputs, tmp_path):  # noqa: F811
    def argv(folder):
        return ["cache", *inputs, "--quantization", "null", "--folder", str(folder)]

    def tuned(folder, output):
        options = [
            "--quantization",
            "null",
            *TRAINING,
            "no",
            "--hidden_state_cache",
            str(folder),
            "--output_dir",
            str(output),
        ]
        assert main(["finetune", *inputs, *options]) == 0
        return weights(output)

    started = time.perf_counter()
    assert main(argv(tmp_path / "whole")) == 0
    seconds = time.perf_counter() - started
    expected = tuned(tmp_path / "whole", tmp_path / "expected")
    for kill in range(max(1, kills // 6)):
        folder = tmp_path / f"states{kill}"
        killed(main, argv(folder), draw=random.Random(f"cache {kill}"), longest=seconds)
        assert main(argv(folder)) == 0
        assert tuned(folder, tmp_path / f"run{kill}") == expected
