"""Gradients through binary gates against their closed forms and against exact expectations."""

import math

import pytest
import torch

from hf_qst.disp.estimators import ESTIMATORS, THRESHOLDS


def slopes(name, logit, count=400_000, temperature=1.0):
    """Gates and ds/dz of many draws at one logit."""
    z = torch.full((count,), float(logit), requires_grad=True)
    gates = ESTIMATORS[name](z, temperature, 0.4).gates
    (gradient,) = torch.autograd.grad(gates.sum(), z)
    return gates.detach(), gradient


@pytest.mark.parametrize("logit", [-2.0, 0.0, 0.7, 3.0])
def test_reinmax_has_its_closed_form(logit):
    gates, gradient = slopes("reinmax", logit, count=1000)
    p = torch.sigmoid(torch.tensor(logit))
    torch.testing.assert_close(gradient, torch.where(gates == 1, (1 - p) / 2, p / 2), atol=1e-6, rtol=0)


def test_reinmax_with_a_temperature_follows_the_general_form():
    z, tau = 0.8, 1.7
    gates, gradient = slopes("reinmax", z, count=1000, temperature=tau)
    p0 = torch.sigmoid(torch.tensor(z))
    p1 = (gates + torch.sigmoid(torch.tensor(z / tau))) / 2
    torch.testing.assert_close(gradient, 2 * p1 * (1 - p1) - p0 * (1 - p0) / 2, atol=1e-6, rtol=0)


def test_printed_variant_gives_the_factors_of_the_printed_formula():
    gates, gradient = slopes("reinmax_as_printed", 3.0, count=2000)
    assert gradient[gates == 1][0].item() == pytest.approx(0.477, abs=1e-3)
    assert gradient[gates == 0][0].item() == pytest.approx(0.415, abs=1e-3)


@pytest.mark.parametrize("logit", [-1.0, 0.5, 3.0])
def test_reinmax_is_unbiased_for_quadratic_losses_and_straight_through_is_not(logit):
    b, c = 0.4, 2.5  # f(s) = b s + c s^2
    p = 1 / (1 + math.exp(-logit))
    exact = (b + c) * p * (1 - p)
    estimates = {}
    for name in ("reinmax", "straight_through"):
        gates, gradient = slopes(name, logit)
        estimates[name] = ((b + 2 * c * gates) * gradient).double().mean().item()
    assert estimates["reinmax"] == pytest.approx(exact, rel=0.02)
    assert abs(estimates["straight_through"] / exact - 1) > 0.1


@pytest.mark.parametrize("name", ["reinmax", "reinmax_as_printed", "straight_through"])
def test_draws_are_binary_with_the_right_probability(name):
    gates, _ = slopes(name, 1.0, count=100_000)
    assert set(gates.unique().tolist()) == {0.0, 1.0}
    assert gates.mean().item() == pytest.approx(1 / (1 + math.exp(-1)), abs=0.01)


def test_gumbel_sigmoid_is_soft_in_the_model_and_rounded_in_the_budget():
    z = torch.full((50_000,), THRESHOLDS["gumbel_sigmoid"], requires_grad=True)
    sample = ESTIMATORS["gumbel_sigmoid"](z, 1.0, 0.4)
    assert ((sample.gates > 0.01) & (sample.gates < 0.99)).float().mean() > 0.3
    assert set(sample.counted.unique().tolist()) <= {0.0, 1.0}
    # Its threshold is where half of the draws are kept.
    assert sample.counted.mean().item() == pytest.approx(0.5, abs=0.01)
    assert not torch.equal(sample.gates.round(), sample.counted)
    assert torch.autograd.grad(sample.counted.sum(), z)[0].abs().sum() > 0
