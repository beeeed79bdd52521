"""Times of calls that take turns, so that a busy moment of the machine hits all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch

from benchmarks.common.measure import synchronize


def processor_clock() -> float:
    """Seconds; with one CPU thread those of the processor, which other processes on the core do not lengthen."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def in_turns(
    calls: Mapping[str, Callable],
    rounds: int,
    device: torch.device,
    before: Callable[[Callable], object] = lambda call: None,
    clock: Callable = time.perf_counter,
) -> dict[str, list]:
    """Time of each call in each round, waited for, after one round that is not counted.

    Args:
        before: is given each call before it runs, and is not timed.
        clock: its differences are the times.
    """
    times: dict[str, list] = {name: [] for name in calls}
    for turn in range(-1, rounds):
        for name, call in calls.items():
            before(call)
            synchronize(device)
            start = clock()
            call()
            synchronize(device)
            if turn >= 0:
                times[name].append(clock() - start)
    return times


def paired_ratio(times: Mapping[str, Sequence[float]], one: str, other: str) -> float | None:
    """Median of one / other over the rounds that both have: they ran next to each other, so drift cancels.

    None without such a round.
    """
    ratios = [a / b for a, b in zip(times.get(one, ()), times.get(other, ()), strict=False)]
    return median(ratios) if ratios else None
