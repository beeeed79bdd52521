"""Widths on a budget: never above it, close below it, the same twice."""

import pytest
import torch

from hf_qst.errors import BudgetError
from hf_qst.pruning.layout import ON_RESIDUAL, SELECTIONS, PruningLayout
from hf_qst.pruning.widths import SelectionMap, best_channels, masks_by_layer, rounded_width, widths_on_budget

WIDE = PruningLayout.uniform(4, 1024, 2816, 1024, 512, 2)
SMALL = PruningLayout.uniform(3, 64, 128, 64, 32, 2)


def scores(plan, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator) * (1 + i % 3) + 0.2 * (i % 5) for i, n in enumerate(plan.sizes)]


def plan_for(layout, constraint="none", selections=SELECTIONS):
    return SelectionMap.of(layout, selections, constraint)


@pytest.mark.parametrize("constraint", ["none", "layer", "model"])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.8, 1.0])
def test_budget_is_met_from_below(ratio, constraint):
    plan = plan_for(WIDE, constraint)
    budget = int(ratio * WIDE.total)
    widths = widths_on_budget(scores(plan), plan, budget)
    assert 0 <= budget - plan.parameters(widths) <= 0.002 * WIDE.total


@pytest.mark.parametrize("multiple", [16, 64, 100])
def test_widths_are_multiples_or_everything(multiple):
    plan = plan_for(WIDE)
    budget = int(0.5 * WIDE.total)
    widths = widths_on_budget(scores(plan), plan, budget, multiple=multiple)
    assert all(w % multiple == 0 or w == n for w, n in zip(widths, plan.sizes, strict=True))
    # What is left is less than one more step of the dearest selection.
    assert (
        0 <= budget - plan.parameters(widths) <= multiple * (WIDE.blocks[0].written_width + 2 * WIDE.size("mlp_middle"))
    )


def test_least_width_holds():
    plan = plan_for(SMALL)
    low = [torch.full((n,), -9.0) if i % 2 else torch.full((n,), 9.0) for i, n in enumerate(plan.sizes)]
    widths = widths_on_budget(low, plan, int(0.4 * SMALL.total), least=5)
    assert min(widths) == 5


def test_higher_scores_stay_and_more_budget_keeps_a_superset():
    plan = plan_for(SMALL)
    z = scores(plan)
    kept = {}
    for ratio in (0.3, 0.6):
        widths = widths_on_budget(z, plan, int(ratio * SMALL.total))
        kept[ratio] = best_channels(z, widths)
        for score, mask, width in zip(z, kept[ratio], widths, strict=True):
            assert mask.sum() == width
            if width < len(score):
                assert score[mask].min() >= score[~mask].max()
    assert all((small & ~large).sum() == 0 for small, large in zip(kept[0.3], kept[0.6], strict=True))


def test_equal_scores_give_the_first_channels():
    assert best_channels([torch.zeros(6)], [2])[0].tolist() == [True, True, False, False, False, False]


def test_unreachable_budget_names_the_smallest():
    plan = plan_for(SMALL, selections=["mlp_middle"])
    with pytest.raises(BudgetError) as caught:
        widths_on_budget(scores(plan), plan, SMALL.total // 10)
    assert caught.value.smallest == plan.parameters([1] * len(plan.sizes))
    assert str(caught.value.smallest) in str(caught.value)


def test_unlearned_selections_keep_everything():
    plan = plan_for(SMALL, selections=["mlp_middle", "attention_in"])
    widths = plan.widths(widths_on_budget(scores(plan), plan, int(0.6 * SMALL.total)))
    for row in widths:
        assert [row[i] for i in (1, 2, 4)] == [64] * 3


@pytest.mark.parametrize(("constraint", "owners"), [("none", 15), ("layer", 6), ("model", 4)])
def test_constraints_share_the_selections_on_the_residual(constraint, owners):
    plan = plan_for(SMALL, constraint)
    assert len(plan.sizes) == owners
    masks = masks_by_layer(plan, best_channels(scores(plan), [n // 2 for n in plan.sizes]))
    for chosen in masks:
        same = [torch.equal(chosen[name], chosen["attention_in"]) for name in ON_RESIDUAL]
        assert all(same) is (constraint != "none")
    across = torch.equal(masks[0]["mlp_in"], masks[1]["mlp_in"])
    assert across is (constraint == "model")


@pytest.mark.parametrize(
    ("count", "multiple", "least", "expected"),
    [(0, 1, 1, 1), (33, 16, 1, 32), (40, 16, 1, 48), (3, 16, 1, 16), (99, 16, 1, 96), (100, 64, 1, 100), (2, 1, 7, 7)],
)
def test_rounded_widths(count, multiple, least, expected):
    assert rounded_width(count, 100, multiple, least) == expected
