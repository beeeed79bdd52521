"""Figures of settings over problems: each family is tuned on one half and reported on the other, both ways round."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from benchmarks.common.tables import markdown
from benchmarks.decoding.outcomes import ERRORS, KS, OBJECTIVES, OTHER, failures
from hf_qst_plugins.code_evaluation import Report, paired_bootstrap, pass_at_k

FIXED = "fixed temperature"
PUBLISHED = {"adaptive, as published": ("adaptive (paper)", "a=0.8 b=0.6 line")}
"""Families of one setting that nobody tuned here: that of the authors' README for HumanEval. Name -> family and setting."""
Reports = Mapping[str, Mapping[str, Report]]
"""Family -> setting -> report. All reports have the same tasks, in the same order."""


def with_interval(drawn: int, passed: Sequence[int], k: int) -> dict:
    """pass@k with its 95 % bootstrap interval over problems."""
    return paired_bootstrap(drawn, passed, [0] * len(passed), k)._asdict()


def complete(
    samples: Mapping[Hashable, Sequence[dict]], counts: Mapping[Hashable, int], order: Sequence[str]
) -> list[str]:
    """The tasks of `order` of which every setting has all its samples.

    Args:
        samples: samples of each setting.
        counts: number of samples that a task must have in each setting.
    """
    drawn = {name: {} for name in samples}
    for name, those in samples.items():
        for sample in those:
            drawn[name][sample["task_id"]] = drawn[name].get(sample["task_id"], 0) + 1
    return [task for task in order if all(drawn[name].get(task, 0) == count for name, count in counts.items())]


def setting_row(family: str, label: str, report: Report) -> dict:
    """The figures of one setting over all tasks."""
    drawn, passed = next(iter(report.drawn.values())), list(report.passed.values())
    row = {"family": family, "setting": label, "drawn": drawn, "tokens": report.tokens / report.samples}
    row |= {f"pass@{k}": with_interval(drawn, passed, k) for k in KS if k <= drawn}
    row["problems_passed"] = sum(count > 0 for count in passed)
    row |= {"parses": report.parse_rate, "distinct": report.distinct, **failures(report)}
    return {**row, "passed": report.passed}


def tuned_rows(reports: Reports) -> list[dict]:
    """One row for each family and objective k: pass@k with the setting that is best on the other half.

    The halves are the tasks at even and at odd positions. `difference` is against the fixed temperature that was chosen
    in the same way.
    """
    rows = []
    for k in OBJECTIVES:
        for family, settings in reports.items():
            drawn = next(iter(next(iter(settings.values())).drawn.values()))
            if k > drawn:
                continue
            passed = {label: list(report.passed.values()) for label, report in settings.items()}
            chosen, reported = [], [0] * len(next(iter(passed.values())))
            for half in (0, 1):
                best = max(passed, key=lambda label: pass_at_k(drawn, passed[label][1 - half :: 2], k))
                chosen.append(best)
                reported[half::2] = passed[best][half::2]
            row = {"family": family, "k": k, "drawn": drawn, "chosen": chosen, "settings": len(settings)}
            rows.append({**row, "pass": with_interval(drawn, reported, k), "passed": reported})
        fixed = next((row for row in rows if row["family"] == FIXED and row["k"] == k), None)
        for row in rows:
            if fixed and row["k"] == k and row is not fixed and row["drawn"] == fixed["drawn"]:
                gain = paired_bootstrap(row["drawn"], row["passed"], fixed["passed"], k)
                row["difference"] = gain._asdict()
    return rows


def stage_report(reports: Reports, tasks: Sequence[str]) -> dict:
    """Figures of the settings of a stage."""
    settings = [
        setting_row(family, label, report) for family, those in reports.items() for label, report in those.items()
    ]
    published = {
        name: {label: reports[family][label]}
        for name, (family, label) in PUBLISHED.items()
        if label in reports.get(family, {})
    }
    of_tasks = [[report.passed[task] for those in reports.values() for report in those.values()] for task in tasks]
    return {
        "tasks": list(tasks),
        "settings": settings,
        "tuned": tuned_rows({**reports, **published}),
        "problems_ever_passed": sum(any(counts) for counts in of_tasks),
    }


def _percent(value: dict, sign: str = "") -> str:
    return f"{100 * value['mean']:{sign}.1f} [{100 * value['low']:{sign}.1f}, {100 * value['high']:{sign}.1f}]"


COLUMNS = [f"pass@{k}" for k in KS]
"""The rates of a `setting_row`."""


def rates(row: dict) -> list[str]:
    """Cells of a `setting_row`, in the order of `COLUMNS`."""
    return [_percent(row[column]) if column in row else "" for column in COLUMNS]


def form_table(rows: Sequence[dict]) -> str:
    """Markdown of the two forms of the prompt."""
    lines = [
        [row["family"], row["setting"], row["form"], *rates(row), str(row["problems_passed"]), f"{row['tokens']:.0f}"]
        for row in rows
    ]
    return markdown(["decoder", "setting", "prompt", *COLUMNS, "problems", "tokens"], lines, text=3)


def tables(stage: dict) -> str:
    """Markdown of a stage: every setting, then the tuned families."""
    shares = ["parses", "distinct", *ERRORS, OTHER]
    settings = [
        [row["family"], row["setting"], *rates(row), str(row["problems_passed"])]
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
        f"{len(stage['tasks'])} problems, of which {stage['problems_ever_passed']} have a passing sample of any setting; "
        "percent, [95 % over problems]"
    )
    return "\n\n".join(
        [
            title,
            markdown(["decoder", "setting", *COLUMNS, "problems", *shares, "tokens"], settings, text=2),
            markdown(["objective", "decoder", "best on odd / on even", "pass@k", "minus fixed"], tuned, text=3),
        ]
    )
