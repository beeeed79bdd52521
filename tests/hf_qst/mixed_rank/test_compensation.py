"""Stage 3: closed form against brute force, the walk through a model against whole forwards, and the gradient form."""

import types

import numpy as np
import pytest
import torch

from hf_qst.base_model.linear_layers import dense_weight
from hf_qst.calibration.moments import CrossMoment
from hf_qst.mixed_rank import LowRankLinear, MixedRankConfig, compress, compress_model, factorize
from hf_qst.mixed_rank.compensation import (
    ProxyRows,
    bias_shift,
    gradient_factors,
    least_squares_factors,
    stage,
    two_streams,
)
from tests.architectures import CONFIGS, digest, tiny, token_batch

D_IN, D_OUT, RANK = 20, 32, 6


def pair(count=400, noise=0.5):
    """Rows of the dense model and of a compressed one: mixed, and with something lost."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(count, D_IN, generator=generator) * torch.arange(1, D_IN + 1) ** -0.5
    mixing = torch.eye(D_IN) + 0.3 * torch.randn(D_IN, D_IN, generator=generator)
    return rows @ mixing + noise * 0.1 * torch.randn(count, D_IN, generator=generator), rows


def weight():
    return torch.randn(D_IN, D_OUT, generator=torch.Generator().manual_seed(1))


def moments(seen, rows):
    statistic = CrossMoment(D_IN, seen.device)
    statistic.add_pair(seen.double(), rows.double())
    return statistic


def distance(seen, rows, factors):
    """||X' A B - X W||^2"""
    left, right = (factor.double().numpy() for factor in factors)
    wanted = rows.double().numpy() @ weight().double().numpy()
    return np.square(seen.double().numpy() @ left @ right - wanted).sum()


def best_of_rank(seen, rows, rank, ridge_weight):
    """Reduced-rank regression by definition: the ridge rows stacked below, then an SVD of the fitted values."""
    seen, rows, dense = (part.double().numpy() for part in (seen, rows, weight()))
    inputs = np.vstack([seen, np.sqrt(ridge_weight) * np.eye(D_IN)])
    wanted = np.vstack([rows @ dense, np.sqrt(ridge_weight) * dense])
    solution = np.linalg.lstsq(inputs, wanted, rcond=None)[0]
    _, _, right = np.linalg.svd(inputs @ solution, full_matrices=False)
    return solution @ right[:rank].T @ right[:rank]


@pytest.mark.parametrize("ridge", [1e-4, 0.03])
@pytest.mark.parametrize("rank", [1, RANK, D_IN - 1])
def test_closed_form_is_the_reduced_rank_regression(rank, ridge):
    seen, rows = pair()
    left, right = least_squares_factors(weight(), moments(seen, rows), rank, shrinkage=None, ridge=ridge)
    mean_energy = np.square(seen.double().numpy()).sum() / D_IN
    expected = best_of_rank(seen, rows, rank, ridge / (1 - ridge) * mean_energy)
    np.testing.assert_allclose((left @ right).numpy(), expected, rtol=1e-6, atol=1e-8)


def test_closed_form_beats_the_first_stage_on_compressed_inputs():
    seen, rows = pair()
    statistic = moments(seen, rows)
    first = [factorize(weight(), RANK, moments(x, x).second_moment()) for x in (rows, seen)]
    ours = least_squares_factors(weight(), statistic, RANK, shrinkage=None, ridge=1e-6)
    assert distance(seen, rows, ours) < 0.9 * min(distance(seen, rows, one) for one in first)


def test_with_equal_inputs_it_is_the_first_stage():
    _, rows = pair()
    left, right = least_squares_factors(weight(), moments(rows, rows), RANK, shrinkage=0.2)
    expected = factorize(weight(), RANK, moments(rows, rows).shrunk(0.2))
    torch.testing.assert_close(left @ right, expected[0] @ expected[1])


def test_centred_form_with_its_bias_is_the_regression_with_an_intercept():
    seen, rows = pair()
    seen, rows = seen + torch.linspace(-2, 2, D_IN), rows + 1.5
    statistic = moments(seen, rows)
    left, right = least_squares_factors(weight(), statistic, D_IN, None, ridge=0.0, centred=True)
    shift = bias_shift(weight(), left, right, *statistic.means())
    inputs = np.hstack([seen.double().numpy(), np.ones((len(seen), 1))])
    wanted = rows.double().numpy() @ weight().double().numpy()
    solution = np.linalg.lstsq(inputs, wanted, rcond=None)[0]
    np.testing.assert_allclose((left @ right).numpy(), solution[:-1], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(shift.numpy(), solution[-1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("compensation", ["none", "lstsq"])
@pytest.mark.parametrize("name", ["opt", "gpt2", "qwen2"])
def test_bias_correction_gives_each_layer_the_mean_output_of_the_dense_one(name, compensation):
    model = compress_model(
        tiny(name), settings(decomposition={"bias_correction": True}, compensation=compensation, keep_ratio=0.4)
    )
    found = {n: m for n, m in model.named_modules() if isinstance(m, LowRankLinear)}
    corrected = [n for n, m in found.items() if m.bias is not None]
    assert corrected and (name != "qwen2" or len(corrected) < len(found))  # Qwen2 has biases in q, k and v only
    for each in corrected[::3]:
        dense = tiny(name).get_submodule(each)
        inputs = seen_by(tiny(name), each, batches())
        seen = inputs if compensation == "none" else seen_by(model, each, batches())
        expected = inputs.mean(0) @ dense_weight(dense).double().numpy() + dense.bias.detach().double().numpy()
        ours = found[each](torch.from_numpy(seen).float()).detach().double().numpy().mean(0)
        np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_dead_inputs_give_the_plain_factors():
    zeros = torch.zeros(50, D_IN)
    left, right = least_squares_factors(weight(), moments(zeros, zeros), RANK)
    expected = factorize(weight(), RANK)
    torch.testing.assert_close(left @ right, expected[0] @ expected[1])


def proxy(seen, rows):
    found = ProxyRows(1)
    found.add_pair(seen, rows)
    return found


def gradient(seen, rows, **settings):
    settings = {"residual_ratio": 0.34, "progress": False, **settings}
    return gradient_factors(weight(), proxy(seen, rows), RANK, moments(seen, seen).second_moment(), **settings)


def test_gradient_form_keeps_the_rank_and_gains_where_the_closed_form_does():
    seen, rows = pair(2000)
    left, right = gradient(seen, rows, steps=400, learning_rate=1e-2)
    assert left.shape == (D_IN, RANK) and right.shape == (RANK, D_OUT)
    main = factorize(weight(), RANK - 2, moments(seen, seen).second_moment())
    assert distance(seen, rows, (left, right)) < 0.9 * distance(seen, rows, main)
    bound = distance(seen, rows, least_squares_factors(weight(), moments(seen, rows), RANK, None, ridge=1e-9))
    assert distance(seen, rows, (left, right)) >= bound


def test_gradient_form_keeps_the_best_step():
    """With a step length that only does harm, what it returns is where it started: the second pair gives nothing."""
    seen, rows = pair()
    left, right = gradient(seen, rows, learning_rate=1e4)
    main = factorize(weight(), RANK - 2, moments(seen, seen).second_moment())
    torch.testing.assert_close(left @ right, main[0] @ main[1])


def test_gradient_form_stops_early():
    _, rows = pair()
    few, many = (gradient(rows, rows, steps=steps, learning_rate=1e4) for steps in (60, 100_000))
    assert torch.equal(few[0], many[0])


def test_gradient_form_is_seeded_and_leaves_the_random_state():
    seen, rows = pair()
    state = torch.get_rng_state()
    one, two, other = (gradient(seen, rows, steps=50, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert not torch.equal(one[0], other[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_proxy_is_bounded():
    found = ProxyRows(4)
    rows = torch.zeros(9000, D_IN)
    for _ in range(4):
        found.add_pair(rows, rows)
    assert 3000 <= sum(map(len, found.rows)) <= 4096


def batches(count=3):
    return [{"input_ids": token_batch(4, 12, seed=s)} for s in range(count)]


def settings(**changes):
    return MixedRankConfig(**{"keep_ratio": 0.6, "calibration_data": batches(), "progress": False, **changes})


def seen_by(model, name, data):
    rows = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda m, a: rows.append(a[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in data:
            model(**batch)
    handle.remove()
    return torch.cat(rows).double().numpy()


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_layer_is_fitted_to_what_the_compressed_model_gives_it(name):
    """Block by block and by whole forwards of both models, the factors of each layer are the same."""
    dense, model = tiny(name), tiny(name)
    model = compress_model(
        model, settings(compensation={"method": "lstsq", "ridge": 1e-3}, decomposition={"shrinkage": None})
    )
    names = [n for n, m in model.named_modules() if isinstance(m, LowRankLinear)]
    assert len(names) > 6
    for each in names[:: max(1, len(names) // 6)]:
        layer = model.get_submodule(each)
        original = dense_weight(dense.get_submodule(each)).double().numpy()
        seen, rows = seen_by(model, each, batches()), seen_by(dense, each, batches())
        ridge = 1e-3 / (1 - 1e-3) * np.square(seen).sum() / seen.shape[1]
        inputs = np.vstack([seen, np.sqrt(ridge) * np.eye(seen.shape[1])])
        wanted = np.vstack([rows @ original, np.sqrt(ridge) * original])
        product = (layer.down.weight.T @ layer.up.weight.T).detach().double().numpy()
        solution = np.linalg.lstsq(inputs, wanted, rcond=None)[0]
        unexplained = np.square(inputs @ solution - wanted).sum()
        left_out = np.square(np.linalg.svd(inputs @ solution, compute_uv=False)[layer.rank :]).sum()
        # Eckart and Young: what no rank-r layer can go below.
        found = np.square(inputs @ product - wanted).sum()
        assert found == pytest.approx(unexplained + left_out, rel=1e-3)


def test_without_known_blocks_the_walk_gives_the_same(monkeypatch):
    known = compress(tiny("llama"), settings(compensation="lstsq"))
    monkeypatch.setattr("hf_qst.mixed_rank.block_walk.find_blocks", lambda model: ())
    whole = compress(tiny("llama"), settings(compensation="lstsq"))
    assert known.ranks == whole.ranks
    for name, layer in known.factors.items():
        torch.testing.assert_close(layer.weight, whole.factors[name].weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compensation", ["none", "lstsq", "gradient"])
def test_the_dense_model_is_left_as_it_was(compensation):
    model = tiny("gpt2").train()
    model.transformer.h[0].eval()
    before, structure, state = digest(model), str(model), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    found = compress(model, settings(compensation={"method": compensation, "steps": 20}))
    assert digest(model) == before and str(model) == structure
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    again = compress(model, settings(compensation={"method": compensation, "steps": 20}))
    assert again.ranks == found.ranks and again.statistics == found.statistics
    for name, layer in found.factors.items():
        assert torch.equal(layer.weight, again.factors[name].weight)


def test_an_error_in_the_middle_leaves_the_model_as_it_was(monkeypatch):
    model = tiny("llama")
    before, structure = digest(model), str(model)
    calls = []

    def fail_late(*args, **kwargs):
        calls.append(args)
        if len(calls) > 9:
            raise KeyboardInterrupt
        return least_squares_factors(*args, **kwargs)

    monkeypatch.setattr("hf_qst.mixed_rank.compensation.stage.least_squares_factors", fail_late)
    with pytest.raises(KeyboardInterrupt):
        compress(model, settings(compensation="lstsq"))
    assert digest(model) == before and str(model) == structure
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def calls_of_layers(model, monkeypatch, **changes):
    """How often each linear layer and each attention of the model runs in the compensation of `compress`."""
    counts = {}
    original = stage.replace_in_order

    def counted(*args):
        named = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) or n.endswith("self_attn")]
        count = lambda n: lambda m, a, o: counts.update({n: counts.get(n, 0) + len(first_tensor(a, o))})
        handles = [module.register_forward_hook(count(name)) for name, module in named]
        try:
            return original(*args)
        finally:
            for handle in handles:
                handle.remove()

    monkeypatch.setattr(stage, "replace_in_order", counted)
    return compress(model, settings(compensation="lstsq", **changes)), counts


def first_tensor(args, output):
    return args[0] if args else output[0]


def test_each_layer_runs_once_in_each_stream(monkeypatch):
    """4 samples in each of 3 batches."""
    found, counts = calls_of_layers(tiny("llama"), monkeypatch)
    last = max(name.split(".")[2] for name in counts)
    layers = {name: count for name, count in counts.items() if name.endswith("proj")}
    assert set(found.dense) & set(layers) and set(found.factors) <= set(layers)
    for name, count in layers.items():
        in_both = [12 + 12] if name in found.dense else [12]
        # In the last block the compressed stream ends before layers that stay dense.
        assert count in in_both or (name.split(".")[2] == last and count == 12), name


def test_without_room_everything_is_computed_again_and_the_same(monkeypatch):
    """The limit is that of the statistics of one group, so that only little of a block's activations fits beside it."""
    plenty, counts = calls_of_layers(tiny("llama"), monkeypatch)
    widest = max(layer.weight.shape[1] for layer in plenty.factors.values())
    scarce, more = calls_of_layers(tiny("llama"), monkeypatch, memory_limit=8 * widest * widest)
    assert sum(more.values()) > 1.1 * sum(counts.values())
    assert plenty.ranks == scarce.ranks
    for name, layer in plenty.factors.items():
        torch.testing.assert_close(layer.weight, scarce.factors[name].weight, rtol=1e-4, atol=1e-5)


def test_what_was_changed_in_place_is_computed_again():
    stream = types.SimpleNamespace(take=lambda output: True)
    kept = two_streams._Kept(torch.nn.Linear(3, 3), stream)
    rows = torch.ones(2, 3)
    with torch.no_grad():
        expected = kept.module(rows)
        for _ in range(3):
            kept.begin(0)
            output = kept(rows)
            torch.testing.assert_close(output, expected)
            output.zero_()
