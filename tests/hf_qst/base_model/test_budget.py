"""The budget of parameters that compressing methods share."""

import pytest

from hf_qst.base_model.budget import Budget


@pytest.mark.parametrize(
    "scope, ratio, expected", [("targets", 0.5, 500), ("targets", 1.0, 1000), ("model", 0.5, 250), ("model", 0.2, -200)]
)
def test_a_budget_counts_what_its_scope_holds(scope, ratio, expected):
    assert Budget(ratio, scope, targets=1000, others=500).parameters == expected


@pytest.mark.parametrize("scope", ["targets", "model"])
def test_the_ratio_that_the_error_names_is_met(scope):
    error = Budget(0.1, scope, 997, 503).error("SomeConfig.", 331, "at the least widths")
    total = 997 if scope == "targets" else 1500
    assert str(error).startswith(
        f"SomeConfig.keep_ratio=0.1 of the {scope}'s {total} parameters cannot be met at the least"
    )
    ratio = float(str(error).rpartition(" ")[2])
    assert Budget(ratio, scope, 997, 503).parameters >= 331 > Budget(ratio - 1e-3, scope, 997, 503).parameters
    assert error.smallest == 331 + total - 997
