"""Residuals: factors added to a quantised or pruned model for what it has lost against the dense one."""

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from hf_qst.base_model.linear_layers import dense_weight
from hf_qst.mixed_rank import LayerSpectrum, MixedRankConfig, compress_model
from hf_qst.mixed_rank.layer import MixedRankLayer
from tests.architectures import digest, in_nf4, tiny, token_batch

IDS = token_batch(8, 12, seed=50)


def batches(count=6):
    return [{"input_ids": token_batch(8, 12, seed=s)} for s in range(count)]


def dense():
    return tiny("llama", num_labels=2)


def pruned():
    """The smallest fifth of every weight inside the blocks set to zero."""
    model = dense()
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and ".layers." in name:
                module.weight[module.weight.abs() < module.weight.abs().quantile(0.2)] = 0
    return model


@pytest.fixture(params=["pruned", "nf4"])
def base(request, tmp_path):
    return pruned() if request.param == "pruned" else in_nf4(tmp_path / "base")


def config(**changes):
    settings = {"residual": {"rank": 8, "reference_model": dense()}, "calibration_data": batches()}
    return MixedRankConfig(**{**settings, "progress": False, **changes})


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def distance(model):
    return (logits(model) - logits(dense())).norm().item()


def inputs_of(model, name):
    rows = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda m, a: rows.append(a[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in batches():
            model(**batch)
    handle.remove()
    return torch.cat(rows).double().numpy()


def test_residuals_bring_the_model_closer_and_lstsq_closest(base):
    before = distance(base)
    found = {}
    for compensation in ("none", "lstsq"):
        model = get_peft_model(base, config(compensation=compensation))
        found[compensation] = distance(model)
        assert model.unload() is base
    assert found["lstsq"] < found["none"] < before


def test_each_residual_is_the_best_of_its_rank(base):
    model = get_peft_model(base, config(compensation="none", decomposition={"shrinkage": None}))
    ranks = model.peft_config["default"].rank_pattern
    for name in list(ranks)[::4]:
        layer = model.base_model.model.get_submodule(name)
        lost = (dense_weight(dense().get_submodule(name)) - dense_weight(layer.base_layer)).double().numpy()
        outputs = inputs_of(dense(), name) @ lost
        optimum = np.square(np.linalg.svd(outputs, compute_uv=False)[ranks[name] :]).sum()
        product = layer.factors.weight.detach().double().numpy().T
        assert np.square(outputs - inputs_of(dense(), name) @ product).sum() == pytest.approx(optimum, rel=1e-4)


def test_budget_is_that_of_the_mean_rank():
    model = get_peft_model(pruned(), config())
    ranks = model.peft_config["default"].rank_pattern
    cost = lambda name: sum(dense().get_submodule(name).weight.shape)
    budget = 8 * sum(map(cost, ranks))
    assert 0.99 * budget <= sum(rank * cost(name) for name, rank in ranks.items()) <= budget
    assert len(set(ranks.values())) > 1
    same = get_peft_model(pruned(), config(allocation="uniform")).peft_config["default"].rank_pattern
    assert set(same.values()) == {8} and same.keys() == ranks.keys()


def test_errors_are_relative_to_the_whole_output():
    spectrum = LayerSpectrum("a", 4, 4, torch.tensor([2.0, 1.0, 1.0, 0.0]), total=40.0)
    assert [spectrum.error(rank) for rank in (1, 2, 3, 4)] == [0.05, 0.025, 0.0, 0.0]


def test_base_is_untouched_and_comes_back(base):
    logits(base)  # bitsandbytes repacks at the first forward
    expected, before, structure = logits(base), digest(base), str(base)
    model = get_peft_model(base, config())
    assert not torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    unloaded = model.unload()
    assert unloaded is base and str(base) == structure
    assert digest(base) == before
    assert torch.equal(logits(base), expected)


def test_saved_residuals_load_without_the_reference(tmp_path):
    model = get_peft_model(pruned(), config())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(pruned(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.peft_config["default"].reference_model is None


def test_merging_into_a_float_base_and_refusal_for_a_quantised_one(base):
    model = get_peft_model(base, config())
    expected = logits(model)
    if base.config.to_dict().get("quantization_config"):
        with pytest.raises(NotImplementedError, match=r"cannot be merged into a quantised weight"):
            model.merge_and_unload()
        assert torch.equal(logits(model), expected)
        return
    merged = model.merge_and_unload()
    assert not any(isinstance(m, MixedRankLayer) for m in merged.modules())
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)


def test_residuals_train():
    model = get_peft_model(pruned(), config()).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if "mixed_rank_factors" in n}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"residual": {}}, "needs reference_model.* got NoneType"),
        ({"residual": {"reference_model": tiny("opt")}}, r"must have a linear layer .*found NoneType"),
        ({"residual": {"reference_model": tiny("llama", hidden_size=32)}}, r"of \[64, 64\] .*found \[32, 64\]"),
        ({"residual": {"rank": 0}}, "residual.rank must be a positive integer, got 0"),
        ({"compensation": "gradient"}, "'lstsq' or 'none', got 'gradient'"),
    ],
)
def test_bad_requests_leave_the_model_alone(changes, message):
    model = pruned()
    before, structure = digest(model), str(model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config(**changes))
    assert digest(model) == before and str(model) == structure


def test_in_place_compression_says_what_to_use():
    with pytest.raises(ValueError, match="use get_peft_model"):
        compress_model(pruned(), config())
