"""What the decoding benchmarks count: the ks, the objectives that settings are tuned for, and kinds of failure."""

from __future__ import annotations

from hf_qst_plugins.code_evaluation import Report

OBJECTIVES = (1, 10)
KS = (1, 5, 10, 15)
OTHER = "other errors"
ERRORS = {"NameError": "name", "SyntaxError": "syntax", "TypeError": "type", "wrong": "wrong"}


def failures(report: Report) -> dict[str, float]:
    """Share of the samples by kind of failure."""
    shares = {name: report.outcomes[outcome] / report.samples for name, outcome in ERRORS.items()}
    named = {"passed", *ERRORS.values()}
    shares[OTHER] = sum(count for outcome, count in report.outcomes.items() if outcome not in named) / report.samples
    return shares
