"""Factors of one weight: against the definition of the optimum in numpy, other methods, and hard inputs."""

import numpy as np
import pytest
import torch

from hf_qst.calibration.moments import SecondMoment
from hf_qst.mixed_rank import factorize, metric_matrix, output_energies
from hf_qst.mixed_rank.decomposition import METRICS, output_error

SHAPES = [(24, 24), (24, 60), (60, 24)]
RANK = 7


def inputs(count, size, seed=0, decay=1.0):
    """Correlated rows whose principal directions have power-law energies."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(99)))
    return torch.randn(count, size, generator=generator) * torch.arange(1, size + 1) ** -decay @ basis


def weight_of(shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moment_of(rows):
    statistic = SecondMoment(rows.shape[1], rows.device)
    statistic.add(rows.double())
    return statistic


def error(rows, weight, left, right):
    """Mean squared output error over rows, in float64."""
    difference = weight.double().numpy() - left.double().numpy() @ right.double().numpy()
    return np.square(rows.double().numpy() @ difference).sum() / len(rows)


def whitened_svd(rows, weight, rank):
    """SVD-LLM's construction: the SVD of L'W for C = LL', with the inverse of L'."""
    moment = rows.double().numpy().T @ rows.double().numpy() / len(rows)
    lower = np.linalg.cholesky(moment)
    left, values, right = np.linalg.svd(lower.T @ weight.double().numpy(), full_matrices=False)
    return np.linalg.solve(lower.T, left[:, :rank] * values[:rank]), right[:rank]


@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_the_sum_of_the_energies_left_out(shape):
    rows, weight = inputs(500, shape[0]), weight_of(shape)
    moment = moment_of(rows).second_moment()
    energies = output_energies(weight, moment)
    assert torch.equal(energies, energies.sort(descending=True).values)
    for rank in (1, RANK, min(shape) - 1):
        left, right = factorize(weight, rank, moment)
        assert error(rows, weight, left, right) == pytest.approx(energies[rank:].sum().item(), rel=1e-6)
    assert energies.sum().item() == pytest.approx(np.square(rows.double() @ weight.double()).sum().item() / 500)


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_are_those_of_the_whitened_svd(shape):
    rows, weight = inputs(500, shape[0]), weight_of(shape)
    left, right = factorize(weight, RANK, moment_of(rows).second_moment())
    expected_left, expected_right = whitened_svd(rows, weight, RANK)
    expected = torch.from_numpy(expected_left @ expected_right)
    torch.testing.assert_close(left @ right, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_other_factors_of_the_rank_do_better(shape):
    rows, weight = inputs(500, shape[0]), weight_of(shape)
    statistic = moment_of(rows)
    best = error(rows, weight, *factorize(weight, RANK, statistic.second_moment()))
    for metric in ("plain", "diagonal"):
        assert error(rows, weight, *factorize(weight, RANK, metric_matrix(statistic, metric))) > best
    generator = torch.Generator().manual_seed(5)
    for _ in range(20):
        directions = torch.randn(shape[1], RANK, generator=generator, dtype=torch.float64)
        # The best left factor for these random directions, by least squares in numpy.
        outputs = (rows.double() @ weight.double()).numpy()
        basis, _ = np.linalg.qr(directions.numpy())
        residual = outputs - outputs @ basis @ basis.T
        assert np.square(residual).sum() / 500 > best


def test_plain_is_the_svd():
    weight = weight_of((30, 50)).double()
    left, right = factorize(weight, RANK)
    basis, values, rotation = np.linalg.svd(weight.numpy(), full_matrices=False)
    expected = basis[:, :RANK] * values[:RANK] @ rotation[:RANK]
    np.testing.assert_allclose((left @ right).numpy(), expected, atol=1e-10)
    np.testing.assert_allclose(output_energies(weight).numpy(), values**2, rtol=1e-10)


def test_diagonal_is_asvds_scaling():
    rows, weight = inputs(300, 24), weight_of((24, 40))
    scale = np.square(rows.double().numpy()).mean(0) ** 0.25
    basis, values, rotation = np.linalg.svd(scale[:, None] * weight.double().numpy(), full_matrices=False)
    expected = basis[:, :RANK] * values[:RANK] @ rotation[:RANK] / scale[:, None]
    left, right = factorize(weight, RANK, metric_matrix(moment_of(rows), "diagonal"))
    np.testing.assert_allclose((left @ right).numpy(), expected, atol=1e-8)


def test_balanced_factors_share_the_scale():
    weight, moment = weight_of((24, 60)) * 100, moment_of(inputs(300, 24)).second_moment()
    left, right = factorize(weight, RANK, moment)
    loose_left, loose_right = factorize(weight, RANK, moment, balance=False)
    torch.testing.assert_close(left @ right, loose_left @ loose_right)
    torch.testing.assert_close(left.T @ left, right @ right.T, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(loose_left.T @ loose_left, loose_right @ loose_right.T)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("metric", METRICS)
def test_full_rank_is_the_weight(shape, metric):
    weight = weight_of(shape)
    statistic = moment_of(inputs(10, shape[0]))  # fewer rows than dimensions
    kind = metric if metric in ("plain", "diagonal") else "second_moment"
    left, right = factorize(weight, min(shape), metric_matrix(statistic, kind, shrinkage=None))
    torch.testing.assert_close(left @ right, weight.double(), rtol=1e-6, atol=1e-6)


HARD = {
    "fewer rows than dimensions": lambda: inputs(10, 48),
    "one row": lambda: inputs(1, 48),
    "dead channels": lambda: inputs(200, 48) * (torch.arange(48) % 3 > 0),
    "equal channels": lambda: inputs(200, 24).repeat(1, 2),
    "an outlier channel": lambda: inputs(200, 48) * torch.where(torch.arange(48) == 5, 1e4, 1.0),
    "a tiny scale": lambda: inputs(200, 48) * 1e-12,
    "a huge scale": lambda: inputs(200, 48) * 1e12,
    "nothing at all": lambda: torch.zeros(200, 48),
}


@pytest.mark.parametrize("shape", [(48, 48), (48, 96), (48, 20)])
@pytest.mark.parametrize("shrinkage", ["ledoit_wolf", None])
@pytest.mark.parametrize("case", HARD)
def test_hard_inputs_give_finite_optimal_factors(case, shrinkage, shape):
    rows, weight = HARD[case](), weight_of(shape)
    left, right = factorize(weight, 8, metric_matrix(moment_of(rows), "second_moment", shrinkage))
    assert torch.isfinite(left).all() and torch.isfinite(right).all()
    if shrinkage is None:
        outputs = (rows.double() @ weight.double()).numpy()
        optimum = np.square(np.linalg.svd(outputs, compute_uv=False)[8:]).sum() / len(rows)
        scale = np.square(outputs).sum() / len(rows)
        assert error(rows, weight, left, right) <= optimum * 1.01 + 1e-10 * scale


@pytest.mark.parametrize("case", ["an outlier channel", "fewer rows than dimensions"])
def test_half_precision_weights_and_rows(case):
    rows, weight = HARD[case]().bfloat16(), weight_of((48, 96)).bfloat16()
    left, right = factorize(weight, 8, metric_matrix(moment_of(rows), "second_moment", None))
    outputs = (rows.double() @ weight.double()).numpy()
    optimum = np.square(np.linalg.svd(outputs, compute_uv=False)[8:]).sum() / len(rows)
    assert error(rows, weight, left, right) <= optimum * 1.01 + 1e-10 * np.square(outputs).sum() / len(rows)


HELD_OUT = {
    "isotropic, many rows": (4096, 0.0),
    "isotropic, few rows": (256, 0.0),
    "correlated, fewer rows than dimensions": (64, 0.5),
    "correlated, many rows": (1024, 0.5),
}


@pytest.mark.parametrize("case", HELD_OUT)
def test_shrunk_factors_are_never_worse_than_plain_on_new_rows(case):
    count, decay = HELD_OUT[case]
    rows, new = inputs(count, 128, 1, decay), inputs(8192, 128, 2, decay)
    weight = weight_of((128, 128))
    statistic = moment_of(rows)
    on_new = lambda moment: error(new, weight, *factorize(weight, 26, moment))
    shrunk, plain = on_new(metric_matrix(statistic)), on_new(None)
    assert shrunk <= plain * (1 + 1e-3)
    if decay:
        assert shrunk <= plain * 0.97
    if case == "isotropic, few rows":
        # The control: without shrinkage they are worse.
        assert on_new(metric_matrix(statistic, shrinkage=None)) > plain * 1.01


def test_output_error_is_the_mean_over_rows():
    rows, weight = inputs(300, 24), weight_of((24, 40))
    left, right = factorize(weight, 5)
    moment = moment_of(rows).second_moment()
    assert output_error(weight.double() - left @ right, moment) == pytest.approx(error(rows, weight, left, right))
    assert output_error(weight, None) == pytest.approx(weight.double().square().sum().item())


@pytest.mark.parametrize("rank", [0, 21, -3])
def test_a_rank_out_of_range_is_refused(rank):
    with pytest.raises(ValueError, match=f"rank must be from 1 to 20 .* got {rank}"):
        factorize(weight_of((48, 20)), rank)


def test_a_weight_with_nan_is_refused():
    weight = weight_of((8, 8))
    weight[2, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        factorize(weight, 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_balance_leaves_the_product_as_it_is_however_far_the_singular_values_spread(shape):
    basis, _, rotation = torch.linalg.svd(weight_of(shape).double(), full_matrices=False)
    weight = basis * torch.logspace(0, -20, min(shape), dtype=torch.float64) @ rotation
    balanced, loose = (factorize(weight, min(shape) - 2, balance=share) for share in (True, False))
    assert all(torch.isfinite(factor).all() for factor in balanced)
    torch.testing.assert_close(balanced[0] @ balanced[1], loose[0] @ loose[1], rtol=0, atol=1e-15)
    sizes = [factor.norm(dim=dim) for factor, dim in zip(balanced, (0, 1), strict=True)]
    assert (sizes[0] <= 2 * sizes[1]).all()  # in directions too weak to be told apart the left may be smaller
    torch.testing.assert_close(*(size[: min(shape) // 3] for size in sizes))
