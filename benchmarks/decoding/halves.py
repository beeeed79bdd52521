"""Figures of settings over problems: each family is tuned on one half and reported on the other, both ways round."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import takewhile

from benchmarks.common.tables import markdown
from benchmarks.decoding.outcomes import ERRORS, KS, OBJECTIVES, OTHER, failures
from hf_qst_plugins.code_evaluation import Report, paired_bootstrap, pass_at_k

FIXED = "fixed temperature"
PUBLISHED = {"adaptive, as published": ("adaptive (paper)", "a=0.8 b=0.6 line")}
"""Families of one setting that nobody tuned here: that of the authors' README for HumanEval. Name -> family and setting."""


def with_interval(drawn: int, passed: Sequence[int], k: int) -> dict:
    """pass@k with its 95 % bootstrap interval over problems."""
    return paired_bootstrap(drawn, passed, [0] * len(passed), k)._asdict()


def complete(
    samples: Mapping[Hashable, Sequence[dict]], counts: Mapping[Hashable, int], order: Sequence[str]
) -> list[str]:
    """The tasks of `order` before the first of which a setting lacks samples.

    A complete task after it does not count: of a batch that was cut short, the tasks with short samples are complete first.

    Args:
        samples: samples of each setting.
        counts: number of samples that a task must have in each setting.
    """
    drawn = {name: {} for name in samples}
    for name, those in samples.items():
        for sample in those:
            drawn[name][sample["task_id"]] = drawn[name].get(sample["task_id"], 0) + 1
    return list(takewhile(lambda task: all(drawn[name].get(task, 0) == n for name, n in counts.items()), order))


MEANS = ["tokens", "parses", "distinct", *ERRORS, OTHER]
"""The figures of a `setting_row` that are means over samples. All tasks have equally many."""


def _row(family: str, label: str, drawn: int, passed: dict[str, int], means: Mapping[str, float]) -> dict:
    counts = list(passed.values())
    row = {"family": family, "setting": label, "drawn": drawn, "tokens": means["tokens"]}
    row |= {f"pass@{k}": with_interval(drawn, counts, k) for k in KS if k <= drawn}
    return {**row, "problems_passed": sum(count > 0 for count in counts), **means, "passed": passed}


def setting_row(family: str, label: str, report: Report) -> dict:
    """The figures of one setting over all tasks."""
    drawn = next(iter(report.drawn.values()))
    means = {"tokens": report.tokens / report.samples, "parses": report.parse_rate, "distinct": report.distinct}
    return _row(family, label, drawn, report.passed, means | failures(report))


def tuned_rows(settings: Sequence[dict]) -> list[dict]:
    """One row for each family of the `settings` and objective k: pass@k with the setting that is best on the other half.

    The halves are the tasks at even and at odd positions. `difference` is against the fixed temperature that was chosen
    in the same way.
    """
    families: dict[str, list[dict]] = {}
    for row in settings:
        families.setdefault(row["family"], []).append(row)
    rows = []
    for k in OBJECTIVES:
        for family, those in families.items():
            drawn = those[0]["drawn"]
            if k > drawn:
                continue
            passed = {row["setting"]: list(row["passed"].values()) for row in those}
            chosen, reported = [], [0] * len(those[0]["passed"])
            for half in (0, 1):
                best = max(passed, key=lambda label: pass_at_k(drawn, passed[label][1 - half :: 2], k))
                chosen.append(best)
                reported[half::2] = passed[best][half::2]
            row = {"family": family, "k": k, "drawn": drawn, "chosen": chosen, "settings": len(those)}
            rows.append({**row, "pass": with_interval(drawn, reported, k), "passed": reported})
        fixed = next((row for row in rows if row["family"] == FIXED and row["k"] == k), None)
        for row in rows:
            if fixed and row["k"] == k and row is not fixed and row["drawn"] == fixed["drawn"]:
                gain = paired_bootstrap(row["drawn"], row["passed"], fixed["passed"], k)
                row["difference"] = gain._asdict()
    return rows


def stage_report(settings: Sequence[dict], problems: int) -> dict:
    """Figures of a stage from the `setting_row` of its settings, which have the same tasks in the same order.

    Args:
        problems: number of problems, of which the tasks are the first in a random order.
    """
    families = list(dict.fromkeys(row["family"] for row in settings))
    settings = sorted(settings, key=lambda row: families.index(row["family"]))
    published = [
        {**row, "family": name}
        for name, of in PUBLISHED.items()
        for row in settings
        if (row["family"], row["setting"]) == of
    ]
    tasks = list(settings[0]["passed"])
    return {
        "tasks": tasks,
        "problems": problems,
        "settings": settings,
        "tuned": tuned_rows([*settings, *published]),
        "problems_ever_passed": sum(any(row["passed"][task] for row in settings) for task in tasks),
    }


def joined_row(first: dict, then: dict) -> dict:
    """The `setting_row` of one setting over the tasks of two that have no task in common."""
    if first["drawn"] != then["drawn"] or first["passed"].keys() & then["passed"].keys():
        raise ValueError(f"{first['family']} {first['setting']}: the rows must have equal counts and different tasks")
    sizes = len(first["passed"]), len(then["passed"])
    means = {name: (sizes[0] * first[name] + sizes[1] * then[name]) / sum(sizes) for name in MEANS}
    return _row(first["family"], first["setting"], first["drawn"], first["passed"] | then["passed"], means)


def _percent(value: dict, sign: str = "") -> str:
    return f"{100 * value['mean']:{sign}.1f} [{100 * value['low']:{sign}.1f}, {100 * value['high']:{sign}.1f}]"


COLUMNS = [f"pass@{k}" for k in KS]
"""The rates of a `setting_row`."""


def rates(row: dict) -> list[str]:
    """Cells of a `setting_row`, in the order of `COLUMNS`."""
    return [_percent(row[column]) if column in row else "" for column in COLUMNS]


def solved(row: dict) -> str:
    """Cell of a `setting_row`: the problems with a passing sample, of all."""
    return f"{row['problems_passed']} of {len(row['passed'])}"


def form_table(rows: Sequence[dict]) -> str:
    """Markdown of the two forms of the prompt."""
    lines = [
        [row["family"], row["setting"], row["form"], *rates(row), solved(row), f"{row['tokens']:.0f}"] for row in rows
    ]
    return markdown(["decoder", "setting", "prompt", *COLUMNS, "problems", "tokens"], lines, text=3)


def tables(stage: dict) -> str:
    """Markdown of a stage: every setting, then the tuned families."""
    shares = ["parses", "distinct", *ERRORS, OTHER]
    settings = [
        [row["family"], row["setting"], *rates(row), solved(row)]
        + [f"{100 * row[share]:.1f}" for share in shares]
        + [f"{row['tokens']:.0f}"]
        for row in stage["settings"]
    ]
    tuned = [
        [f"pass@{row['k']}", row["family"], " / ".join(row["chosen"]), _percent(row["pass"])]
        + ([_percent(row["difference"], "+")] if "difference" in row else [])
        for row in stage["tuned"]
    ]
    title = (
        f"{len(stage['tasks'])} of {stage['problems']} problems, taken at random; {stage['problems_ever_passed']} have a "
        "passing sample of any setting; percent, [95 % over problems]"
    )
    return "\n\n".join(
        [
            title,
            markdown(["decoder", "setting", *COLUMNS, "problems", *shares, "tokens"], settings, text=2),
            markdown(["objective", "decoder", "best on odd / on even", "pass@k", "minus fixed"], tuned, text=3),
        ]
    )
