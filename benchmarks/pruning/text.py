"""The texts of the pruning benchmark: those of the project's base, and code and prose for a model of somebody else."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer

from benchmarks.compression.llm import Text, load_text
from examples.corpus import blocks, split, stdlib_files, tokens
from examples.prose import handbook_files

CALIBRATION_ROWS = 2


def python(model: str | Path, length: int, training: int, calibration: int, held: int) -> tuple[Text, torch.Tensor]:
    """Calibration and held-out text of the project's base, which was trained on the first; rows [n, length] to train on."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = blocks(tokens(split(stdlib_files())[0], tokenizer), length, training)
    return load_text(model, calibration, held), rows


def python_and_prose(
    model: str | Path, length: int, training: int, calibration: int, held: int
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
        {kind: blocks(tokens(second, tokenizer), length, held) for kind, (_, second) in files.items()},
    )
    return text, rows


TEXTS = {"python": python, "python-and-prose": python_and_prose}
"""By name, functions of (model, length of a row, training rows, calibration blocks, held-out blocks)."""
