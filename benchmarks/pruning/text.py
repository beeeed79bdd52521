"""The texts of the pruning benchmark: those of the project's base, and code and prose for a model of somebody else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
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

    The first `calibration` rows calibrate, all `training` rows are trained on; the held-out ones are of other files.

    Raises:
        NoTextError: the handbook is not on this machine.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    files = {"code": split(stdlib_files()), "handbook": split(handbook_files())}
    kinds = [blocks(tokens(first, tokenizer), length, training // 2) for first, _ in files.values()]
    count = min(map(len, kinds))
    rows = torch.stack([kind[:count] for kind in kinds], 1).flatten(0, 1)
    text = Text(
        [{"input_ids": part} for part in rows[:calibration].split(CALIBRATION_ROWS)],
        {kind: held_rows(tokens(second, tokenizer), length, held, other) for kind, (_, second) in files.items()},
    )
    return text, rows


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
