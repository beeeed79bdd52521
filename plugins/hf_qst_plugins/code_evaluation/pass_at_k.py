"""pass@k, the probability that at least one of k completions of a task passes, and its difference between two decoders.

The unbiased estimator of Chen et al., *Evaluating Large Language Models Trained on Code*, arXiv 2107.03374, equation 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


def _whole(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return int(value)


def task_pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n-c, k) / C(n, k) for one task: `n` samples of which `c` pass.

    Computed as 1 - the product of (1 - k/j) over j = n-c+1 .. n, which cannot overflow.

    Raises:
        ValueError: a value is not a whole number, `k` is outside 1 to `n`, or `c` outside 0 to `n`.
    """
    n, c, k = _whole("n", n, 1), _whole("c", c, 0), _whole("k", k, 1)
    if k > n:
        raise ValueError(f"k={k} is more than the n={n} samples; pass@k needs k <= n, so draw at least {k} samples")
    if c > n:
        raise ValueError(f"c={c} of n={n} samples cannot have passed; give c <= n")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / j for j in range(n - c + 1, n + 1))


def _per_task(name: str, values: int | Sequence[int], tasks: int) -> list[int]:
    if isinstance(values, (int, np.integer)):
        return [int(values)] * tasks
    if len(values) != tasks:
        raise ValueError(f"{name} has {len(values)} values for {tasks} tasks; give one number or one a task")
    return list(values)


def pass_at_k(n: int | Sequence[int], c: Sequence[int], k: int) -> float:
    """Mean over tasks of the unbiased pass@k.

    Args:
        n: samples drawn, one number for all tasks or one a task [tasks].
        c: samples that passed, one a task [tasks].
        k: the k of pass@k.

    Raises:
        ValueError: no task, or a task with `k` > `n`.
    """
    if len(c) == 0:
        raise ValueError("c is empty; give the number of passing samples of at least one task")
    return math.fsum(task_pass_at_k(*task, k) for task in zip(_per_task("n", n, len(c)), c, strict=True)) / len(c)


class Difference(NamedTuple):
    """pass@k of `a` minus that of `b`: mean over tasks and confidence interval."""

    mean: float
    low: float
    high: float


def paired_bootstrap(
    n: int | Sequence[int],
    a: Sequence[int],
    b: Sequence[int],
    k: int,
    draws: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Difference in pass@k between two decoders on the same tasks, with a percentile bootstrap interval.

    Each resample draws tasks with replacement and uses the same tasks for both decoders, so the difficulty of a task
    cancels. The interval covers the choice of tasks, not the seed of the samples.

    Args:
        n: samples per task, as in `pass_at_k`.
        a, b: passing samples of the first and of the second decoder, in the same order of tasks [tasks].
        k: the k of pass@k.
        draws: number of resamples.
        confidence: share of the resamples inside the interval, in (0, 1).
        seed: of the resamples.

    Raises:
        ValueError: `a` and `b` differ in length or are empty, or an argument is out of range.
    """
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(f"a and b must hold the same tasks and at least one, got {len(a)} and {len(b)}")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie between 0 and 1, both excluded, got {confidence!r}")
    draws = _whole("draws", draws, 1)
    counts = _per_task("n", n, len(a))
    triples = zip(counts, a, b, strict=True)
    gains = np.array([task_pass_at_k(n, first, k) - task_pass_at_k(n, second, k) for n, first, second in triples])
    chosen = np.random.default_rng(seed).integers(len(gains), size=(draws, len(gains)))
    tail = (1.0 - confidence) / 2
    low, high = np.quantile(gains[chosen].mean(axis=1), [tail, 1.0 - tail])
    return Difference(float(gains.mean()), float(low), float(high))
