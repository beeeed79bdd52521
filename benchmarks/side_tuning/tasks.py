"""Tasks for a real pretrained language model: English prose of a new kind, and the sentiment of movie reviews.

Each has batches to train on, held-out batches, and batches of the text that the model knew before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from examples.corpus import blocks, split, stdlib_files, tokens
from examples.prose import handbook_files
from examples.reviews import Review, reviews

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Token ids [rows, seq], and as labels [rows, seq] those to predict, -100 elsewhere. Padding is on the right."""

    ids: torch.Tensor
    labels: torch.Tensor

    @property
    def count(self) -> int:
        """Predicted tokens."""
        return int((self.labels[:, 1:] != IGNORED).sum())


@dataclass(frozen=True)
class Task:
    """Batches of one task.

    Args:
        answers: of a classification, the tokens of the classes; each row then has one label, and the accuracy is the part
            of rows whose label has the largest score of these tokens.
    """

    train: list[Batch]
    held: list[Batch]
    old: list[Batch]
    answers: list[int] = field(default_factory=list)


def _texts(rows: torch.Tensor, batch: int) -> list[Batch]:
    return [Batch(part, part) for part in rows.split(batch)]


def _old(tokenizer) -> list[Batch]:
    """The standard library's source: a model for general use has read much code."""
    return _texts(blocks(tokens(split(stdlib_files())[1], tokenizer), 256, 8), 2)


def prose(tokenizer, steps: int, seed: int) -> Task:
    """Two blocks of 256 tokens of the Debian handbook a step; 16 held-out blocks, of other pages."""
    files, held_files = split(handbook_files(), held_out=0.1)
    rows = blocks(tokens(files, tokenizer), 256)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    # A second epoch follows the first in the same order.
    rows = rows[order.repeat(-(-2 * steps // len(rows)))[: 2 * steps]]
    return Task(_texts(rows, 2), _texts(blocks(tokens(held_files, tokenizer), 256, 16), 2), _old(tokenizer))


def sentiment(tokenizer, steps: int, seed: int) -> Task:
    """Eight sentences of movie reviews a step, each followed by ` positive` or ` negative`; 400 held-out sentences."""
    train, test = reviews(seed=0)
    start = (seed * 8 * steps) % len(train)
    chosen = [train[(start + i) % len(train)] for i in range(8 * steps)]
    answers = {positive: tokenizer.encode(" positive" if positive else " negative") for positive in (True, False)}
    if any(len(ids) != 1 for ids in answers.values()):
        raise ValueError(f"the tokenizer must have one token for each answer, got {answers}")

    def batches(rows: list[Review]) -> list[Batch]:
        return [_batch(tokenizer, rows[i : i + 8], answers) for i in range(0, len(rows), 8)]

    return Task(batches(chosen), batches(test[:400]), _old(tokenizer), [ids[0] for ids in answers.values()])


def _batch(tokenizer, rows: list[Review], answers: dict[bool, list[int]]) -> Batch:
    ids = torch.full((len(rows), 64), tokenizer.eos_token_id)
    labels = torch.full_like(ids, IGNORED)
    for i, row in enumerate(rows):
        prompt = tokenizer.encode(f"Review: {row.text}\nSentiment:")[:63]
        ids[i, : len(prompt) + 1] = torch.tensor([*prompt, *answers[row.positive]])
        labels[i, len(prompt)] = ids[i, len(prompt)]
    return Batch(ids, labels)


TASKS: dict[str, Callable[..., Task]] = {"prose": prose, "sentiment": sentiment}


def accuracy(task: Task, scores: list[torch.Tensor]) -> float:
    """Percent of held-out rows whose own class has the larger score.

    Args:
        scores: for each held-out batch the logits of `task.answers` [rows, seq, classes].
    """
    right = total = 0
    for batch, logits in zip(task.held, scores, strict=True):
        row, place = (batch.labels != IGNORED).nonzero(as_tuple=True)
        chosen = torch.tensor(task.answers)[logits[row, place - 1].argmax(-1).cpu()]
        right += int((chosen == batch.labels[row, place]).sum())
        total += len(row)
    return 100 * right / total
