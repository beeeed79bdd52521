"""The shipped base model is what its card says, and a training run that was interrupted ends as if it had not been."""

import codeop
import json
import math
import platform
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples import train_base
from examples.corpus import blocks, held_out_loss, split, stdlib_files, tokens

FOLDER = Path(train_base.__file__).parent / "base_model"


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def results():
    return json.loads((FOLDER / "training_log.json").read_text())["results"]


def test_the_file_is_small_bfloat16_and_finite():
    path = FOLDER / "model.safetensors"
    assert path.stat().st_size <= 25_000_000
    for name, weight in load_file(path).items():
        assert weight.dtype == torch.bfloat16, name
        assert weight.isfinite().all() and weight.float().std() > 0, name


def test_the_folder_loads_as_it_is_stored(results):
    stored = AutoModelForCausalLM.from_pretrained(FOLDER)
    assert stored.dtype == torch.bfloat16
    assert stored.num_parameters() == results["parameters"]
    assert stored.lm_head.weight is stored.model.embed_tokens.weight


def test_the_tokenizer_loses_nothing_and_packs_indentation(model, tokenizer):
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id == model.config.eos_token_id
    text = "def f(self):\n        return self._größe['λ'][1234]  # 漢字\n\t\r\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    deep = "\n" + " " * 15  # a line break and all its indentation but the blank that goes with the next word
    assert tokenizer.tokenize(deep + " return")[0] == tokenizer.tokenize(deep)[0] and len(tokenizer.tokenize(deep)) == 1


def test_the_loss_is_what_the_card_says(model, tokenizer, results):
    """On the blocks the card's `check` figure was measured on; on another Python the held-out files differ a little."""
    held = tokens(split(stdlib_files())[1], tokenizer)
    loss = held_out_loss(model, blocks(held, results["block_length"], results["check"]["blocks"]))
    same = results["python"] == platform.python_version()
    assert loss == pytest.approx(results["check"]["loss"], abs=0.005 if same else 0.3)
    assert loss < results["stdlib"]["ngram_loss"] - 0.7


def is_start_of_python(text):
    """Whether `text` is Python, or would be with more after it."""
    try:
        codeop.compile_command(text, symbol="exec")
    except (SyntaxError, ValueError, OverflowError):
        return False
    return True


STARTS = [
    "import os\nimport sys\n\n\ndef main():",
    "import re\n\n\ndef words(text):",
    "import unittest\n\n\nclass Tests(unittest.TestCase):",
    "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y =",
    "import os\n\n\nfor name in os.listdir(path):",
    "import sys\n\n\nclass Error(Exception):",
    "import io\n\n\nclass Reader(io.RawIOBase):\n    def read(self, size=-1):",
]


def test_what_it_writes_is_python(model, tokenizer):
    """Greedy continuations, up to the last whole line: nearly all are the start of a program that compiles."""
    good = 0
    for start in STARTS:
        inputs = tokenizer(tokenizer.bos_token + start, return_tensors="pt")
        made = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        text = tokenizer.decode(made[0], skip_special_tokens=True)
        assert text.startswith(start)
        good += text.count("\n", len(start)) > 0 and is_start_of_python(text[: text.rindex("\n")])
    assert good >= len(STARTS) - 2


def test_the_card_quotes_the_log(results):
    card = (FOLDER / "README.md").read_text()
    for name in ("stdlib", "transformers"):
        r = results[name]
        assert f"{r['loss']:.3f} | {r['perplexity']:.2f} | {r['bits_per_byte']:.3f} | {r['ngram_loss']:.3f}" in card
        assert r["perplexity"] == pytest.approx(math.exp(r["loss"]))
        assert r["loss"] < r["ngram_loss"]
    assert f"{(FOLDER / 'model.safetensors').stat().st_size:,} bytes" in card


TINY = [
    *("--hidden=32", "--layers=1", "--heads=2", "--kv-heads=1", "--intermediate=32", "--vocab=300", "--positions=32"),
    *("--seq=32", "--batch=2", "--max-files=6", "--steps=7", "--precision=float32", "--warmup=0.3"),
]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_run_equals_straight_run(tmp_path, optimizer):
    options = [*TINY, "--optimizer", optimizer]
    train_base.main([*options, "--run", str(tmp_path / "straight")])
    train_base.main([*options, "--run", str(tmp_path / "broken"), "--stop-at", "3"])
    stopped = train_base.latest_checkpoint(tmp_path / "broken")
    assert stopped.name == "step-0000003"
    # Only what may change is given again; the rest comes from the checkpoint.
    train_base.main(["--run", str(tmp_path / "broken"), "--resume", "--steps", "7"])
    ends = [train_base.latest_checkpoint(tmp_path / run) for run in ("straight", "broken")]
    assert [end.name for end in ends] == ["step-0000007"] * 2 and not stopped.exists()
    for file in ("model.safetensors", "optimizer.safetensors"):
        one, two = (load_file(end / file) for end in ends)
        assert one.keys() == two.keys()
        for name in one:
            assert torch.equal(one[name], two[name]), (file, name)
    one, two = (json.loads((end / "state.json").read_text()) for end in ends)
    assert all(one[key] == two[key] for key in ("step", "epoch", "used", "tokens", "finished")) and one["finished"]
    with pytest.raises(FileExistsError, match="holds checkpoints; give --resume"):
        train_base.main([*options, "--run", str(tmp_path / "broken")])


def test_an_unfinished_run_exports_a_preliminary_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        train_base.main(["--run", str(tmp_path / "run"), "--export-only", str(tmp_path / "out")])
    train_base.main([*TINY, "--run", str(tmp_path / "run"), "--stop-at", "2"])
    train_base.main(["--run", str(tmp_path / "run"), "--export-only", str(tmp_path / "out")])
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    trained = load_file(train_base.latest_checkpoint(tmp_path / "run") / "model.safetensors")
    for name, weight in made.named_parameters():
        assert torch.equal(weight, trained[name].bfloat16()), name
    assert "After 2 steps of an unfinished run" in (tmp_path / "out" / "README.md").read_text()


def test_no_window_repeats_and_every_token_is_predicted_once_an_epoch():
    ids = torch.arange(1, 400).numpy()
    ids[[50, 51, 200, 398]] = 0
    first = train_base.epoch_windows(ids, 0, 16, seed=0, epoch=0)
    assert (first == train_base.epoch_windows(ids, 0, 16, seed=0, epoch=0)).all()
    targets = first[:, 1:].flatten().tolist()
    kept = [t for t in targets if t]
    assert len(set(kept)) == len(kept) and len(targets) > len(ids) - 2 * 16 - 1
    second = train_base.epoch_windows(ids, 0, 16, seed=0, epoch=1)
    assert not {tuple(w) for w in first.tolist()} & {tuple(w) for w in second.tolist()}


def test_schedule():
    scales = [train_base.lr_scale(progress, warmup=0.2) for progress in (0.0, 0.1, 0.2, 0.6, 1.0, 1.1)]
    assert scales == pytest.approx([0, 0.5, 1, 0.5, 0, 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --minutes, --steps or both"),
        (["--steps", "0"], "--steps 0: give a number above 0"),
        (["--steps", "1", "--hidden", "100"], "each must divide the one before"),
        (["--steps", "1", "--seq", "4096"], "--seq 4096 is more than --positions 512"),
    ],
)
def test_bad_options_are_named(options, message, capsys):
    with pytest.raises(SystemExit):
        train_base.arguments(options)
    assert message in capsys.readouterr().err
