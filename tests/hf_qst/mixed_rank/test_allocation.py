"""Ranks under a budget: against every choice there is, a linear program, and the promises about budgets."""

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from hf_qst.mixed_rank import BudgetError, LayerSpectrum, allocate_ranks
from hf_qst.mixed_rank.allocation import ALLOCATORS, DENSE


def layer(name, shape, decay, scale=1.0, noise=0.0, seed=0):
    """A power-law spectrum."""
    energies = scale * torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -decay
    wiggle = 1 + noise * torch.rand(min(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return LayerSpectrum(name, *shape, (energies * wiggle).sort(descending=True).values)


def transformer(width, blocks, noise=0.3):
    """Spectra of a transformer's layers; later blocks fall off slower."""
    layers = []
    for i in range(blocks):
        for j, (part, shape) in enumerate(
            (("q", (width, width)), ("v", (width, width)), ("fc1", (width, 4 * width)), ("fc2", (4 * width, width)))
        ):
            decay = 2.0 - 1.2 * i / blocks + 0.3 * j
            layers.append(layer(f"{i}.{part}", shape, decay, 10.0**j, noise, seed=7 * i + j))
    return layers


def total(layers, ranks):
    return sum(one.cost(ranks[one.name]) for one in layers)


def loss(layers, ranks):
    return sum(one.error(ranks[one.name]) for one in layers)


def budget_of(layers, keep):
    return int(keep * sum(one.dense_cost for one in layers))


@pytest.mark.parametrize("allocator", ALLOCATORS)
@pytest.mark.parametrize("keep", [0.25, 0.4, 0.6, 0.8])
@pytest.mark.parametrize("width, blocks, multiple", [(48, 3, 1), (384, 12, 8)])
def test_budget_is_used_and_never_exceeded(allocator, keep, width, blocks, multiple):
    layers = transformer(width, blocks)
    budget = budget_of(layers, keep)
    ranks = allocate_ranks(layers, budget, allocator, multiple)
    # A small model's step from one rank to the next can be more than half a percent.
    step = multiple * max(one.in_features + one.out_features for one in layers)
    assert min(0.995 * budget, budget - step) < total(layers, ranks) <= budget
    if allocator == "hull":
        assert 0.995 * budget <= total(layers, ranks)
    for one in layers:
        rank = ranks[one.name]
        assert rank == DENSE or (rank % multiple == 0 and rank < one.break_even)


def test_no_choice_is_better_than_the_hull_by_more_than_a_step():
    for seed in range(20):
        generator = np.random.default_rng(seed)
        shapes = [tuple(int(s) for s in generator.integers(4, 9, 2)) for _ in range(3)]
        layers = [layer(str(i), s, generator.uniform(0.2, 2), 1, 1.0, seed + i) for i, s in enumerate(shapes)]
        choices = [[DENSE, *range(1, int(np.ceil(one.break_even)))] for one in layers]
        for keep in (0.5, 0.7, 0.9):
            budget = budget_of(layers, keep)
            every = [dict(zip("012", ranks, strict=True)) for ranks in itertools.product(*choices)]
            fitting = [ranks for ranks in every if total(layers, ranks) <= budget]
            if not fitting:
                continue
            best = min(loss(layers, ranks) for ranks in fitting)
            found = loss(layers, allocate_ranks(layers, budget, min_rank_ratio=0.0))
            # One step: the most that the error can fall between neighbouring points of one layer's hull.
            step = max(one.error(max(one.ranks(1, 1))) for one in layers) + max(
                one.error(r) - one.error(r + 1) for one in layers for r in one.ranks(1, 1)
            )
            assert best <= found + 1e-12 <= best + step + 1e-12


@pytest.mark.parametrize("keep", [0.25, 0.4, 0.6])
def test_hull_is_within_a_percent_of_the_relaxation(keep):
    layers = transformer(384, 12)
    budget = budget_of(layers, keep)
    options = [(i, one, r) for i, one in enumerate(layers) for r in (*one.ranks(8, 8), DENSE)]
    one_each = np.zeros((len(layers), len(options)))
    for column, (i, _, _) in enumerate(options):
        one_each[i, column] = 1
    costs = [[one.cost(r) for _, one, r in options]]
    bound = linprog([one.error(r) for _, one, r in options], costs, [budget], one_each, np.ones(len(layers)))
    found = loss(layers, allocate_ranks(layers, budget, rank_multiple=8, min_rank_ratio=0.0))
    assert bound.fun <= found + 1e-9 <= bound.fun * 1.01 + 1e-9


@pytest.mark.parametrize("keep", [0.25, 0.4, 0.6, 0.8])
def test_hull_is_no_worse_than_the_others(keep):
    layers = transformer(384, 12)
    losses = {a: loss(layers, allocate_ranks(layers, budget_of(layers, keep), a, 8)) for a in ALLOCATORS}
    assert losses["hull"] <= losses["gradual"] * (1 + 1e-9)
    assert losses["hull"] < losses["uniform"]


def test_uniform_keeps_one_fraction():
    layers = transformer(96, 4)
    ranks = allocate_ranks(layers, budget_of(layers, 0.4), "uniform")
    for one in layers:
        assert abs(ranks[one.name] - 0.4 * one.break_even) <= 1


def test_scale_of_a_layer_does_not_matter():
    """Errors are relative: a layer with a thousand times the activations gets no more."""
    shapes = [("a", 1.0), ("b", 1000.0)]
    layers = [layer(name, (64, 64), 1.0, scale) for name, scale in shapes]
    ranks = allocate_ranks(layers, budget_of(layers, 0.4))
    assert abs(ranks["a"] - ranks["b"]) <= 1


def test_layer_that_is_hard_to_factor_stays_dense():
    easy = [layer(str(i), (64, 64), 4.0) for i in range(3)]
    flat = LayerSpectrum("flat", 64, 64, torch.ones(64))
    ranks = allocate_ranks([*easy, flat], budget_of([*easy, flat], 0.5))
    assert ranks["flat"] == DENSE
    ranks = allocate_ranks([*easy, flat], budget_of([*easy, flat], 0.5), allow_dense=False)
    assert 0 < ranks["flat"] < 32


def test_everything_stays_dense_when_the_budget_allows_it():
    layers = transformer(48, 2)
    for allocator in ALLOCATORS:
        assert set(allocate_ranks(layers, budget_of(layers, 1.0), allocator).values()) == {DENSE}


def test_floor_holds_up_weak_layers():
    strong = layer("strong", (64, 64), 0.1)
    weak = LayerSpectrum("weak", 64, 64, torch.cat([torch.ones(1), torch.full((63,), 1e-9)]))
    budget = budget_of([strong, weak], 0.5)
    assert allocate_ranks([strong, weak], budget, min_rank_ratio=0.0)["weak"] < 8
    assert allocate_ranks([strong, weak], budget, min_rank_ratio=0.5)["weak"] >= 8


def test_given_ranks_are_kept_and_count():
    layers = transformer(48, 3)
    budget = budget_of(layers, 0.4)
    fixed = {"0.q": 3, "1.fc1": DENSE}
    ranks = allocate_ranks(layers, budget, fixed=fixed)
    assert {name: ranks[name] for name in fixed} == fixed
    assert 0.99 * budget <= total(layers, ranks) <= budget
    assert list(ranks) == [one.name for one in layers]


def test_impossible_budget_names_the_smallest():
    layers = transformer(48, 2)
    smallest = sum(8 * (one.in_features + one.out_features) for one in layers)
    with pytest.raises(BudgetError, match=f"at least {smallest}") as caught:
        allocate_ranks(layers, smallest - 1, rank_multiple=8)
    assert caught.value.smallest == smallest
    assert set(allocate_ranks(layers, smallest, rank_multiple=8).values()) == {8}


def test_layer_without_output_takes_the_least():
    layers = [LayerSpectrum("dead", 64, 64, torch.zeros(64)), layer("alive", (64, 64), 0.5)]
    ranks = allocate_ranks(layers, budget_of(layers, 0.4), min_rank_ratio=0.0)
    assert ranks["dead"] < ranks["alive"]


def test_tiny_layer_that_no_rank_makes_smaller_stays_dense():
    layers = [layer("tiny", (1, 4), 1.0), layer("other", (64, 64), 1.0)]
    assert allocate_ranks(layers, budget_of(layers, 0.5))["tiny"] == DENSE


def test_unknown_allocator_is_refused():
    with pytest.raises(ValueError, match="allocator must be one of hull, gradual, uniform, got 'greedy'"):
        allocate_ranks([layer("a", (8, 8), 1.0)], 64, "greedy")


@pytest.mark.parametrize("allocator", ALLOCATORS)
@pytest.mark.parametrize("least", [0.2, 0.5])
def test_factors_that_save_too_little_are_not_made(allocator, least):
    layers = transformer(64, 3)
    budget = budget_of(layers, 0.7)
    plain = allocate_ranks(layers, budget, allocator)
    for one in layers:
        one.min_saving = least
    ranks = allocate_ranks(layers, budget, allocator)
    assert total(layers, ranks) <= budget
    for one in layers:
        assert ranks[one.name] == DENSE or one.cost(ranks[one.name]) <= (1 - least) * one.dense_cost
    if allocator == "hull" and least == 0.5:
        assert any(one.cost(plain[one.name]) > (1 - least) * one.dense_cost for one in layers if plain[one.name])
        assert sum(rank == DENSE for rank in ranks.values()) > sum(rank == DENSE for rank in plain.values())


def test_weights_count_in_the_choice_but_not_in_the_relative_error():
    layers = [layer("a", (64, 64), 1.0), layer("b", (64, 64), 1.0)]
    budget = budget_of(layers, 0.5)
    same = allocate_ranks(layers, budget, min_rank_ratio=0.0, allow_dense=False)
    layers[0].weight = 10.0
    found = allocate_ranks(layers, budget, min_rank_ratio=0.0, allow_dense=False)
    assert found["a"] > same["a"] and found["b"] < same["b"]
    assert layers[0].relative_error(5) == layers[1].relative_error(5) == layers[0].error(5) / 10
