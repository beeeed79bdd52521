"""How the benchmarks print: Markdown tables, means with intervals, verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev

MIB = 2**20
# Student's 97.5 % points by degrees of freedom.
_STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
MOST_VALUES = max(_STUDENT) + 1


def markdown(columns: Sequence[str], lines: Sequence[Sequence[str]], text: int = 1) -> str:
    """A table whose first `text` columns are text and whose others are figures; short lines are filled up."""
    if any(len(line) > len(columns) for line in lines):
        raise ValueError(f"a line must have at most {len(columns)} cells")
    rule = ["---"] * text + ["---:"] * (len(columns) - text)
    filled = [[*line, *[""] * (len(columns) - len(line))] for line in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in [columns, rule, *filled])


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half width of Student's 95 % interval; None for a single value or more than `MOST_VALUES`."""
    width = _STUDENT.get(len(values) - 1)
    return mean(values), None if width is None else width * stdev(values) / math.sqrt(len(values))


def pm(value: tuple[float, float | None], digits: int = 1) -> str:
    middle, width = value
    return f"{middle:.{digits}f}" + ("" if width is None else f" ± {width:.{digits}f}")


def verdict(holds: bool) -> str:
    return "met" if holds else "missed"
