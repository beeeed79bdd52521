"""The texts of the pruning benchmark: those of the project's base, and code and prose for a model of somebody else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer

from benchmarks.compression.llm import Text, load_text
from examples.corpus import blocks, split, stdlib_files, tokens
from examples.prose import handbook_files

CALIBRATION_ROWS = 2
# DISP's start and rate on SmolLM2 were chosen on so many held-out rows of each kind of python-and-prose, or on some of them.
CHOSEN_ON = 8


def python(model: str | Path, length: int, training: int, calibration: int, held: int) -> tuple[Text, torch.Tensor]:
    """Calibration and held-out text of the project's base, which was trained on the first; rows [n, length] to train on."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = blocks(tokens(split(stdlib_files())[0], tokenizer), length, training)
    return load_text(model, calibration, held), rows


def python_and_prose(
    model: str | Path, length: int, training: int, calibration: int, held: int, other: bool = False
) -> tuple[Text, torch.Tensor]:
    """As many rows of the Python standard library as of the Debian handbook, in turns, all of `length` tokens.

    All `training` rows are trained on, and `calibration` of them, evenly spaced, calibrate: the first ones would be of a
    few files alone. The held-out rows are of other files.

    Raises:
        NoTextError: the handbook is not on this machine.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    files = {"code": split(stdlib_files()), "handbook": split(handbook_files())}
    kinds = [blocks(tokens(first, tokenizer), length, training // 2) for first, _ in files.values()]
    count = min(map(len, kinds))
    pairs = torch.stack([kind[:count] for kind in kinds], 1)
    spread = torch.linspace(0, count - 1, calibration // 2).round().long()
    text = Text(
        [{"input_ids": part} for part in pairs[spread].flatten(0, 1).split(CALIBRATION_ROWS)],
        {kind: held_rows(tokens(second, tokenizer), length, held, other) for kind, (_, second) in files.items()},
    )
    return text, pairs.flatten(0, 1)


def held_rows(ids: np.ndarray, length: int, count: int, other: bool) -> torch.Tensor:
    """`count` rows of `length` tokens, evenly spaced; with `other` none of those that settings were chosen on."""
    if not other:
        return blocks(ids, length, count)
    rows, used = blocks(ids, length), blocks(ids, length, CHOSEN_ON)
    free = rows[~(rows[:, None] == used).all(-1).any(1)]
    return blocks(free.flatten().numpy(), length, count)


def python_and_prose_other(*sizes) -> tuple[Text, torch.Tensor]:
    """The same, with held-out rows that DISP's settings were not chosen on."""
    return python_and_prose(*sizes, other=True)


TEXTS = {
    "python": python,
    "python-and-prose": python_and_prose,
    "python-and-prose-other": python_and_prose_other,
}
"""By name, functions of (model, length of a row, training rows, calibration blocks, held-out blocks)."""


class OtherTextError(ValueError):
    """A file of rows that holds another text, or other sizes of it."""


def kept(
    path: Path | None, name: str, model: str, sizes: tuple[int, ...], read: Callable[..., tuple[Text, torch.Tensor]]
) -> tuple[Text, torch.Tensor]:
    """The text of `read(*sizes)`, from the file where it is there; else the file is written.

    Args:
        path: a `.safetensors` file, or None for no file.
        name, model: what the file is said to hold: the text, and the model whose tokens they are.
        sizes: length of a row, training rows, calibration blocks, held-out blocks.

    Raises:
        OtherTextError: the file holds another text or other sizes.
    """
    if path is None:
        return read(*sizes)
    described = json.dumps([name, model, *sizes])
    if not path.exists():
        text, rows = read(*sizes)
        tensors = {f"held {i} {kind}": text.held[kind] for i, kind in enumerate(text.held)} | {"rows": rows}
        tensors |= {f"calibration {i:04}": batch["input_ids"] for i, batch in enumerate(text.calibration)}
        save_file({key: value.int().contiguous() for key, value in tensors.items()}, path, {"text": described})
    with safe_open(path, "pt") as file:
        if (found := file.metadata()["text"]) != described:
            raise OtherTextError(f"--rows {path} holds {found}, not {described}")
        every = {key: file.get_tensor(key).long() for key in sorted(file.keys())}
    calibration = [{"input_ids": rows} for key, rows in every.items() if key.startswith("calibration ")]
    held = {key.split(" ", 2)[2]: rows for key, rows in every.items() if key.startswith("held ")}
    return Text(calibration, held), every["rows"]
