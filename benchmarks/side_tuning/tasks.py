"""Tasks for a real pretrained language model: English prose, the sentiment of movie reviews, the bodies of functions.

Each has batches to train on, held-out batches, others to choose a learning rate by, and batches of the text that the
model knew before.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from benchmarks.decoding.humaneval import humaneval_file
from benchmarks.side_tuning.functions import documented_functions, solved
from examples.corpus import SourceFile, blocks, split, stdlib_files, tokens
from examples.prose import handbook_files
from examples.reviews import Review, reviews
from hf_qst_plugins.code_evaluation import read_problems

IGNORED = -100
FUNCTION_ROWS, FUNCTION_LENGTH = 4, 128
PROBLEMS = 82


@dataclass(frozen=True)
class Batch:
    """Token ids [rows, seq], and as labels [rows, seq] those to predict, -100 elsewhere. Padding is on the right."""

    ids: torch.Tensor
    labels: torch.Tensor

    @property
    def prompt(self) -> torch.Tensor:
        """The positions before each row's first label that predict none [rows, seq]."""
        labelled = (self.labels != IGNORED).roll(-1, 1)
        labelled[:, -1] = False
        return labelled.cumsum(1) == 0

    @property
    def count(self) -> int:
        """Predicted tokens."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch(self.ids.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Task:
    """Batches of one task.

    Args:
        answers: of a classification, the tokens of the classes; each row then has one label, and the accuracy is the part
            of rows whose label has the largest score of these tokens.
        score: further figures of a model.
        validation: neither trained on nor held out: the rate is chosen by their loss.
    """

    train: list[Batch]
    held: list[Batch]
    old: list[Batch]
    answers: list[int] = field(default_factory=list)
    score: Callable[[nn.Module], dict] | None = None
    validation: list[Batch] = field(default_factory=list)

    def to(self, device: torch.device) -> Task:
        """The same with its batches on another device."""
        parts = ("train", "held", "old", "validation")
        return replace(self, **{name: [batch.to(device) for batch in getattr(self, name)] for name in parts})


def _texts(rows: torch.Tensor, batch: int) -> list[Batch]:
    return [Batch(part, part) for part in rows.split(batch)]


def _old(tokenizer) -> list[Batch]:
    """The standard library's source: a model for general use has read much code."""
    return _texts(blocks(tokens(split(stdlib_files())[1], tokenizer), 256, 8), 2)


def prose(tokenizer, steps: int, seed: int) -> Task:
    """Two blocks of 256 tokens of the Debian handbook a step; 16 held-out blocks and 16 for validation, of other pages."""
    files, held_files = split(handbook_files(), held_out=0.1)
    rows = blocks(tokens(files, tokenizer), 256)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    # A second epoch follows the first in the same order.
    rows = rows[order.repeat(-(-2 * steps // len(rows)))[: 2 * steps]]
    others = blocks(tokens(held_files, tokenizer), 256)
    held = spread(len(others), 16)
    rest = others[[i for i in range(len(others)) if i not in held]]
    validation = rest[spread(len(rest), 16)]
    return Task(_texts(rows, 2), _texts(others[held], 2), _old(tokenizer), validation=_texts(validation, 2))


def spread(count: int, chosen: int) -> list[int]:
    """So many of `count` numbers from 0, evenly spaced."""
    return torch.linspace(0, count - 1, chosen).round().long().tolist()


def sentiment(tokenizer, steps: int, seed: int) -> Task:
    """Eight sentences of movie reviews a step, each followed by ` positive` or ` negative`; 400 held-out
    sentences, and 400 for validation."""
    train, test = reviews(seed=0)
    start = (seed * 8 * steps) % len(train)
    chosen = [train[(start + i) % len(train)] for i in range(8 * steps)]
    answers = {positive: tokenizer.encode(" positive" if positive else " negative") for positive in (True, False)}
    if any(len(ids) != 1 for ids in answers.values()):
        raise ValueError(f"the tokenizer must have one token for each answer, got {answers}")

    def batches(rows: list[Review]) -> list[Batch]:
        return [_batch(tokenizer, rows[i : i + 8], answers) for i in range(0, len(rows), 8)]

    parts = batches(chosen), batches(test[:400]), _old(tokenizer)
    return Task(*parts, [ids[0] for ids in answers.values()], validation=batches(test[400:800]))


def _batch(tokenizer, rows: list[Review], answers: dict[bool, list[int]]) -> Batch:
    prompts = [tokenizer.encode(f"Review: {row.text}\nSentiment:")[:63] for row in rows]
    return _answered(tokenizer, [(prompt, answers[row.positive]) for prompt, row in zip(prompts, rows, strict=True)])


def _answered(tokenizer, rows: list[tuple[list[int], list[int]]]) -> Batch:
    """Prompts with their answers, padded to the longest; the answers are to be predicted."""
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), length), tokenizer.eos_token_id)
    labels = torch.full_like(ids, IGNORED)
    for i, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.tensor([*prompt, *answer])
        labels[i, len(prompt) : end] = ids[i, len(prompt) : end]
    return Batch(ids, labels)


def functions(tokenizer, steps: int, seed: int) -> Task:
    """Four functions with docstrings a step, at most 128 tokens each, of the standard library; the body is predicted.

    Held out are 64 functions of other files, and 64 more are for validation. The score is how many of 82 problems of
    HumanEval, drawn by chance, a greedy completion solves. The text that the model knew before is the prose here.
    """

    def batches(files: list[SourceFile], count: int, seed: int) -> list[Batch]:
        rows = []
        found = list(documented_functions(files))
        random.Random(seed).shuffle(found)
        for prompt, body in found:
            row = tokenizer.encode(prompt), [*tokenizer.encode(body), tokenizer.eos_token_id]
            if sum(map(len, row)) <= FUNCTION_LENGTH:
                rows.append(row)
            if len(rows) == count:
                break
        if len(rows) < count:
            raise ValueError(f"there are only {len(rows)} functions to learn from, {count} are needed")
        return [_answered(tokenizer, rows[i : i + FUNCTION_ROWS]) for i in range(0, count, FUNCTION_ROWS)]

    training, held = split(stdlib_files())
    prose_rows = blocks(tokens(split(handbook_files(), held_out=0.1)[1], tokenizer), 256, 8)
    problems = read_problems(humaneval_file("humaneval"))
    random.Random(0).shuffle(problems)
    problems = problems[:PROBLEMS]
    score = lambda model: {"solved": solved(model, tokenizer, problems), "problems": len(problems)}
    others, count = batches(held, 128, 0), 64 // FUNCTION_ROWS
    parts = batches(training, FUNCTION_ROWS * steps, seed), others[:count], _texts(prose_rows, 2)
    return Task(*parts, score=score, validation=others[count:])


TASKS: dict[str, Callable[..., Task]] = {"prose": prose, "sentiment": sentiment, "functions": functions}


def accuracy(task: Task, scores: list[torch.Tensor]) -> float:
    """Percent of held-out rows whose own class has the larger score.

    Args:
        scores: for each held-out batch the logits of `task.answers` [rows, seq, classes].
    """
    right = total = 0
    for batch, logits in zip(task.held, scores, strict=True):
        row, place = (batch.labels != IGNORED).nonzero(as_tuple=True)
        chosen = torch.tensor(task.answers, device=logits.device)[logits[row, place - 1].argmax(-1)]
        right += int((chosen == batch.labels[row, place]).sum())
        total += len(row)
    return 100 * right / total
