"""Input statistics from a streaming pass: against numpy on the recorded rows, and the model afterwards."""

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf
from torch import nn

from hf_qst.calibration import (
    CalibrationError,
    as_batches,
    collect_statistics,
    input_groups,
    plan_passes,
)
from hf_qst.calibration.moments import CrossMoment, SecondMoment
from tests.architectures import digest, tiny, token_batch

NAMES = [
    f"model.layers.{i}.{part}"
    for i in range(3)
    for part in (
        *(f"self_attn.{n}_proj" for n in "qkvo"),
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
]


def batches(count=3, rows=4, length=10):
    return [{"input_ids": token_batch(rows, length, seed=s)} for s in range(count)]


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def collect(model, data, kind="second_moment", names=NAMES, **settings):
    """Statistics by module name."""
    groups = input_groups(model, names, data[0])
    found = {}
    for part in plan_passes(model, groups, kind, settings.pop("memory_limit", None)):
        statistics = collect_statistics(model, part, data, kind, progress=False, **settings)
        found.update({name: s for group, s in statistics.items() for name in group})
    return found


def recorded(model, name, data):
    """Every row [n, d] that a module sees, padding included, in float64."""
    rows = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda m, a: rows.append(a[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in data:
            model(**batch)
    handle.remove()
    return torch.cat(rows).double().numpy()


def assert_near(moment, expected, rounding=1e-6):
    """Entries of a second moment [d, d] within a part of the sizes of their two channels, as products round them."""
    scale = np.sqrt(np.diag(expected) + np.finfo(float).tiny)
    assert (np.abs(moment.numpy() - expected) <= rounding * np.outer(scale, scale)).all()


@pytest.mark.parametrize("name", [NAMES[0], NAMES[3], NAMES[13]])
def test_moments_are_numpys(name):
    model, data = tiny("llama"), batches()
    statistic = collect(model, data)[name]
    rows = recorded(model, name, data)
    assert statistic.count == len(rows) == 120
    assert_near(statistic.second_moment(), rows.T @ rows / len(rows))
    mean, covariance = statistic.mean_and_covariance()
    np.testing.assert_allclose(mean.numpy(), rows.mean(0), rtol=1e-5, atol=1e-7)
    assert_near(covariance, np.cov(rows.T, bias=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk", [1, 7, 64, 5000])
def test_chunks_of_any_size_give_the_same(chunk, dtype):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6000, 600, generator=generator) * torch.logspace(-3, 3, 600)
    statistic = SecondMoment(600, rows.device)
    for part in rows[: 10 * chunk].split(chunk):
        statistic.add(part.to(dtype))
    expected = rows[: 10 * chunk].double().numpy()
    rounding = 1e-6 if dtype == torch.float32 else 1e-12
    assert_near(statistic.second_moment(), expected.T @ expected / len(expected), rounding)
    assert torch.equal(statistic.products.triu(512), statistic.products.tril(-512).T)
    fourth = (np.square(expected).sum(1) ** 2).sum()
    np.testing.assert_allclose(statistic.fourth.item(), fourth, rtol=rounding)


def test_memory_does_not_grow_with_the_rows():
    statistic = SecondMoment(8, torch.device("cpu"))
    size = lambda: sum(v.numel() for v in vars(statistic).values() if torch.is_tensor(v))
    before = size()  # products, their sum and the fourth powers
    for seed in range(5):
        statistic.add(torch.randn(1000, 8, generator=torch.Generator().manual_seed(seed)))
    assert size() == before == 8 * 8 + 8 + 1


@pytest.mark.parametrize("count", [20, 200, 5000])
def test_shrinkage_is_scikit_learns(count):
    """Their estimate for data taken as centred is ours for the uncentred second moment."""
    generator = torch.Generator().manual_seed(count)
    rows = torch.randn(count, 16, generator=generator) @ torch.randn(16, 16, generator=generator)
    statistic = SecondMoment(16, rows.device)
    statistic.add(rows)
    shrunk, intensity = ledoit_wolf(rows.double().numpy(), assume_centered=True)
    assert statistic.ledoit_wolf() == pytest.approx(intensity, rel=1e-6)
    assert_near(statistic.shrunk(statistic.ledoit_wolf()), shrunk)


def test_cross_moment_pairs_the_rows():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 5000, 6, generator=generator, dtype=torch.float64)
    statistic = CrossMoment(6, left.device)
    statistic.add_pair(left, right)
    np.testing.assert_allclose(statistic.cross.numpy(), (left.double().T @ right.double()).numpy(), rtol=1e-9)
    np.testing.assert_allclose(statistic.products.numpy(), (left.double().T @ left.double()).numpy(), rtol=1e-9)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_for_nothing(side):
    model = tiny("llama")
    data = batches()
    plain = collect(model, data)
    padded = []
    for batch in data:
        ids, pad = batch["input_ids"], torch.full((4, 5), 7)
        mask = torch.ones(4, 10, dtype=torch.long), torch.zeros(4, 5, dtype=torch.long)
        order = slice(None) if side == "right" else slice(None, None, -1)
        padded.append(
            {
                "input_ids": torch.cat([ids, pad][order], 1),
                "attention_mask": torch.cat(mask[order], 1),
                # With its own positions a left-padded text is the same text.
                "position_ids": torch.cat([torch.arange(10), torch.zeros(5, dtype=torch.long)][order]).expand(4, 15),
            }
        )
    with_padding = collect(model, padded)
    for name in NAMES:
        assert with_padding[name].count == plain[name].count
        left, right = with_padding[name].second_moment(), plain[name].second_moment()
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)
    # The control: without the mask the padding shows.
    unmasked = collect(model, [{k: v for k, v in b.items() if k != "attention_mask"} for b in padded])
    assert not torch.allclose(unmasked[NAMES[0]].second_moment(), plain[NAMES[0]].second_moment(), rtol=1e-2)


def test_nan_behind_the_mask_is_not_seen():
    layer = nn.ModuleDict({"linear": nn.Linear(4, 4)})
    layer.forward = lambda inputs, attention_mask: layer["linear"](inputs)
    rows = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    rows[1, 2] = torch.nan
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    data = [{"inputs": rows, "attention_mask": mask}]
    statistic = collect_statistics(layer, [("linear",)], data, progress=False)[("linear",)]
    assert statistic.count == 5
    with pytest.raises(CalibrationError, match="'linear' hold NaN or infinite values"):
        collect_statistics(layer, [("linear",)], [{"inputs": rows, "attention_mask": mask * 0 + 1}], progress=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_module_with_bad_inputs_is_named(value):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = value
    before = hooks_of(model)
    with pytest.raises(CalibrationError, match=r"layers\.1\.mlp\.down_proj"):
        collect(model, batches())
    assert hooks_of(model) == before


def test_modules_with_one_input_share_a_statistic():
    groups = input_groups(tiny("llama"), NAMES, batches()[0])
    assert [len(group) for group in groups] == [3, 1, 2, 1] * 3
    assert [name for group in groups for name in group] == NAMES
    parallel = tiny("phi")
    names = [n for n, m in parallel.model.layers.named_modules() if isinstance(m, nn.Linear)]
    groups = input_groups(parallel, [f"model.layers.{n}" for n in names], batches()[0])
    # Phi's MLP reads what its attention reads.
    assert {n.rpartition(".")[2] for n in groups[0]} == {"q_proj", "k_proj", "v_proj", "fc1"}


@pytest.mark.parametrize("limit", [64 * 64 * 8, 128 * 128 * 8, 300_000])
def test_memory_limit_is_kept_and_changes_nothing(limit):
    model, data = tiny("llama"), batches()
    groups = [g for g in input_groups(model, NAMES, data[0]) if limit >= 128 * 128 * 8 or "down" not in g[0]]
    names = [name for group in groups for name in group]
    plan = plan_passes(model, groups, memory_limit=limit)
    assert len(plan) > 1
    size = lambda group: model.get_submodule(group[0]).in_features ** 2 * 8
    assert all(sum(map(size, part)) <= limit for part in plan)
    assert [group for part in plan for group in part] == groups
    whole, parts = collect(model, data, names=names), collect(model, data, names=names, memory_limit=limit)
    for name in names:
        assert torch.equal(whole[name].products, parts[name].products)


def test_too_small_a_memory_limit_names_the_need():
    model = tiny("llama")
    with pytest.raises(CalibrationError, match=r"memory_limit must be at least 131072 bytes .*down_proj.*got 40000"):
        plan_passes(model, [(name,) for name in NAMES], memory_limit=40_000)


def test_model_mode_hooks_and_random_state_are_left_alone():
    model = tiny("opt").train()
    model.model.decoder.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before, hooks, state = digest(model), hooks_of(model), torch.get_rng_state()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n]
    one, two = (collect(model, batches(), names=names) for _ in range(2))
    assert [module.training for module in model.modules()] == modes
    assert digest(model) == before
    assert hooks_of(model) == hooks
    assert torch.equal(torch.get_rng_state(), state)
    # Dropout was off: twice the same.
    assert all(torch.equal(one[n].products, two[n].products) for n in names)


def test_normalized_divides_each_sample_by_its_output():
    model, data = tiny("opt"), batches(2)
    name = "model.decoder.layers.1.fc1"
    module = model.get_submodule(name)
    weight = module.weight.detach().double().numpy().T
    expected = np.zeros((64, 64))
    for sample in recorded(model, name, data).reshape(8, 10, 64):
        expected += sample.T @ sample / np.square(sample @ weight).sum()
    found = collect(model, data, "normalized", names=[name])[name]
    np.testing.assert_allclose(found.products.numpy(), expected, rtol=1e-4, atol=1e-9)


def test_representative_is_the_mean_sample():
    model, data = tiny("llama"), batches(2)
    mean = recorded(model, NAMES[4], data).reshape(8, 10, 64).mean(0)
    found = collect(model, data, "representative", names=[NAMES[4]])[NAMES[4]]
    np.testing.assert_allclose(found.second_moment().numpy(), mean.T @ mean / 10, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    "data, message",
    [
        ([], "at least one batch, got none"),
        ([torch.ones(2, 3)], "batch 0 is Tensor"),
        ([{}, 3], "batch 1 is int"),
        ([{"input_ids": torch.ones(0, 4)}], r"batch 0 holds no model input \(keys: input_ids\)"),
    ],
)
def test_data_that_is_none_is_refused(data, message):
    with pytest.raises(CalibrationError, match=message):
        as_batches(iter(data))


def test_batches_are_read_up_to_the_limit():
    reader = iter(batches(5))
    assert len(as_batches(reader, 2)) == 2
    assert len(list(reader)) == 3


def test_lists_become_tensors():
    assert torch.equal(as_batches([{"input_ids": [[1, 2]]}])[0]["input_ids"], torch.tensor([[1, 2]]))


def test_a_module_that_does_not_run_is_named():
    model = tiny("llama")
    model.model.layers[0].unused = nn.Linear(4, 4)
    with pytest.raises(CalibrationError, match=r"layers\.0\.unused' is not reached"):
        input_groups(model, [*NAMES, "model.layers.0.unused"], batches()[0])


def test_half_precision_inputs_keep_full_precision_sums():
    model = tiny("llama", dtype=torch.bfloat16)
    statistic = collect(model, batches(), names=[NAMES[0]])[NAMES[0]]
    rows = recorded(model, NAMES[0], batches())
    assert_near(statistic.second_moment(), rows.T @ rows / len(rows))
