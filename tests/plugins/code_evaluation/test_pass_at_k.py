"""pass@k and the paired bootstrap, against counting and against a formula."""

import math
from itertools import combinations

import numpy as np
import pytest

from hf_qst_plugins.code_evaluation import paired_bootstrap, pass_at_k, task_pass_at_k


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_one_task_is_the_share_of_subsets_with_a_passing_sample(n):
    for c in range(n + 1):
        passing = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            subsets = list(combinations(passing, k))
            assert task_pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(200, 3, 100), (15, 1, 15), (15, 0, 15), (1000, 37, 250), (15, 4, 10)])
def test_one_task_equals_the_binomials(n, c, k):
    exact = 1 - math.comb(n - c, k) / math.comb(n, k)
    assert task_pass_at_k(n, c, k) == pytest.approx(exact, abs=1e-12)


def test_the_mean_is_over_tasks_of_different_sizes():
    assert pass_at_k([2, 4], [1, 1], 1) == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert pass_at_k(15, [15, 0, 1], 15) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((15, [1], 16), ["k=16", "n=15"]),
        ((15, [16], 1), ["c=16", "n=15"]),
        ((15, [1], 0), ["k", "at least 1", "0"]),
        ((15, [1], 1.5), ["k", "whole number", "1.5"]),
        ((15, [], 1), ["c is empty"]),
        (([15, 15], [1], 1), ["n has 2 values", "1 tasks"]),
    ],
)
def test_bad_counts_are_refused(arguments, words):
    with pytest.raises(ValueError) as error:
        pass_at_k(*arguments)
    assert all(word in str(error.value) for word in words)


def test_a_decoder_does_not_differ_from_itself():
    assert paired_bootstrap(15, [3, 0, 15, 7], [3, 0, 15, 7], 5) == (0.0, 0.0, 0.0)


def test_the_interval_is_that_of_the_mean_of_the_tasks_differences():
    rng = np.random.default_rng(0)
    a, b = rng.binomial(15, 0.5, 400), rng.binomial(15, 0.4, 400)
    found = paired_bootstrap(15, a, b, 1, seed=3)
    gains = (a - b) / 15
    error = gains.std(ddof=1) / math.sqrt(len(gains))
    assert found.mean == pytest.approx(gains.mean())
    # 10,000 draws find a 2.5 % quantile within a few per cent of the standard error.
    assert found.low == pytest.approx(gains.mean() - 1.96 * error, abs=0.12 * error)
    assert found.high == pytest.approx(gains.mean() + 1.96 * error, abs=0.12 * error)
    assert found == paired_bootstrap(15, a, b, 1, seed=3)
    wider = paired_bootstrap(15, a, b, 1, confidence=0.99, seed=3)
    assert wider.low < found.low < found.high < wider.high


def test_pairing_takes_out_what_the_tasks_share():
    easy_and_hard = np.array([15, 0] * 50)
    better = np.clip(easy_and_hard + np.array([0, 1] * 50), 0, 15)
    assert paired_bootstrap(15, better, easy_and_hard, 1).low > 0


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"b": [1]}, "a and b"),
        ({"a": [], "b": []}, "a and b"),
        ({"confidence": 1.0}, "confidence"),
        ({"draws": 0}, "draws"),
    ],
)
def test_bad_bootstraps_are_refused(changes, word):
    with pytest.raises(ValueError, match=word):
        paired_bootstrap(**{"n": 15, "a": [1, 2], "b": [2, 3], "k": 1, **changes})
