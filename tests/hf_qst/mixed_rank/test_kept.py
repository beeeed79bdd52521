"""Mixed rank with its dense weights kept: what PEFT promises of adapters, against weights put together by hand."""

import copy

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from hf_qst.base_model.linear_layers import dense_weight
from hf_qst.mixed_rank import BudgetError, LowRankLinear, MixedRankConfig, NoDenseWeightsError, compress_model
from hf_qst.mixed_rank.layer import MixedRankLayer
from tests.architectures import digest, in_nf4, tiny, token_batch

IDS = token_batch(seed=50)
FLOATS = {"atol": 1e-4, "rtol": 1e-4}


def config(seed=0, **changes):
    data = [{"input_ids": token_batch(4, 12, seed=seed + i)} for i in range(3)]
    settings = {"keep_ratio": 0.5, "calibration_data": data, "allocation": {"allow_dense": False}, "progress": False}
    return MixedRankConfig(**{**settings, "keep_base_weights": True, **changes})


def two_adapters(name="opt", **changes):
    """Adapters "first", active, and "second", of other data and other ranks."""
    model = get_peft_model(tiny(name), config(**changes), adapter_name="first")
    model.add_adapter("second", config(seed=9, keep_ratio=0.7, **changes))
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def layers(model):
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, MixedRankLayer)
    }


def by_hand(model, names, base):
    """`base` with the sum of the adapters' differences in its weights."""
    base = copy.deepcopy(base)
    with torch.no_grad():
        for path, layer in layers(model).items():
            module = base.get_submodule(path)
            weight, bias = module.weight.clone(), None if module.bias is None else module.bias.clone()
            for name in names:
                if name in layer.mixed_rank_factors:
                    factors = layer.mixed_rank_factors[name]
                    module.weight += factors.up.weight @ factors.down.weight - weight
                    if bias is not None:
                        module.bias += factors.up.bias - bias
    return base


@pytest.mark.parametrize("names", [["first"], ["second"], ["first", "second"]])
def test_active_adapters_add_their_differences_from_the_base(names):
    model = two_adapters(decomposition={"bias_correction": True})
    model.base_model.set_adapter(names)
    expected = logits(by_hand(model, names, tiny("opt")))
    torch.testing.assert_close(logits(model), expected, **FLOATS)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, **FLOATS)
    small = model.merge_and_unload()
    torch.testing.assert_close(logits(small), expected, **FLOATS)
    # One adapter leaves its factors, a sum of two dense weights.
    assert any(isinstance(m, LowRankLinear) for m in small.modules()) == (len(names) == 1)
    assert not any(isinstance(m, MixedRankLayer) for m in small.modules())


@pytest.mark.parametrize("merged", [[], ["first"], ["second", "first"]])
def test_the_base_comes_back_bit_for_bit(merged):
    base = tiny("opt")
    expected, before = logits(base), digest(base)
    model = get_peft_model(base, config(decomposition={"bias_correction": True}), adapter_name="first")
    model.add_adapter("second", config(seed=9))
    adapted = logits(model)
    for name in merged:
        model.merge_adapter([name])
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), adapted)
    for name in merged:
        model.merge_adapter([name])
    assert model.unload() is base
    assert digest(base) == before and torch.equal(logits(base), expected)


def test_a_second_adapter_is_made_from_the_base_and_not_from_the_first():
    model = get_peft_model(tiny("llama"), config(modules_to_save=["lm_head"]), adapter_name="first")
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["first"].weight.mul_(3)
    adapted = logits(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="merged"):
        model.add_adapter("second", config(seed=9, allocation={"layer_weight": "fisher", "allow_dense": False}))
    assert torch.equal(logits(model), adapted)
    alone = get_peft_model(
        tiny("llama"),
        config(seed=9, allocation={"layer_weight": "fisher", "allow_dense": False}),
        adapter_name="second",
    )
    assert model.peft_config["second"].rank_pattern == alone.peft_config["second"].rank_pattern
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(alone))


def test_a_second_adapter_that_fails_changes_nothing():
    model = get_peft_model(tiny("llama"), config())
    expected, structure = logits(model), str(model)
    with pytest.raises(BudgetError):
        model.add_adapter("second", config(keep_ratio=0.001))
    assert torch.equal(logits(model), expected) and str(model) == structure
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("name", ["down", "mlp", "0", "model", "weight"])
@pytest.mark.parametrize("first", [True, False])
def test_a_name_that_peft_would_confuse_is_refused_for_two_adapters(name, first):
    """PEFT saves an adapter without the tensors whose keys hold another adapter's name between dots."""
    names = (name, "other") if first else ("other", name)
    model = get_peft_model(tiny("llama"), config(target_modules=["up_proj"]), adapter_name=names[0])
    structure = str(model)
    with pytest.raises(ValueError, match=f"adapter_name .* got '{name}'"):
        model.add_adapter(names[1], config(target_modules=["up_proj"]))
    assert list(model.peft_config) == [names[0]] and str(model) == structure


def test_the_name_of_a_refused_adapter_stays_free_in_transformers_own_methods():
    model = tiny("llama")
    model.add_adapter(config(), adapter_name="first")
    with pytest.raises(BudgetError):
        model.add_adapter(config(keep_ratio=0.001), adapter_name="second")
    model.add_adapter(config(), adapter_name="second")
    assert list(model.peft_config) == ["first", "second"]


@pytest.mark.parametrize("first, second", [(True, False), (False, True)])
def test_every_adapter_has_to_keep_the_base(first, second):
    model = get_peft_model(tiny("llama"), config(keep_base_weights=first))
    expected = logits(model)
    with pytest.raises(ValueError, match="keep_base_weights=True"):
        model.add_adapter("second", config(keep_base_weights=second))
    assert torch.equal(logits(model), expected)


def test_what_an_adapter_leaves_dense_is_the_base_for_it():
    """A layer with factors of one adapter only, while the other is active."""
    base = tiny("llama")
    model = get_peft_model(base, config(target_modules=["q_proj"]), adapter_name="first")
    model.add_adapter("second", config(target_modules=["up_proj"]))
    alone = get_peft_model(tiny("llama"), config(target_modules=["up_proj"]))
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(alone))


def test_the_loss_without_adapters_in_training_is_the_bases():
    base = tiny("llama")
    expected = base(input_ids=IDS, labels=IDS).loss
    model = get_peft_model(base, config()).train()
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS, labels=IDS).loss, expected)
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("mixed_rank_factors" in name)


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_safe_merge_names_the_broken_adapter_before_anything_is_merged(call):
    model = two_adapters()
    *_, last = layers(model).values()
    with torch.no_grad():
        last.mixed_rank_factors["second"].up.weight[0, 0] = torch.nan
    expected, structure = logits(model), str(model)
    with pytest.raises(ValueError, match="The adapter second seems to be broken"):
        getattr(model, call)(safe_merge=True, adapter_names=["first", "second"])
    assert torch.equal(logits(model), expected) and str(model) == structure
    assert not any(layer.merged for layer in layers(model).values())
    getattr(model, call)(safe_merge=True, adapter_names=["first"])


@pytest.mark.parametrize("cast", [True, False])
def test_half_precision_follows_the_rule_of_peft(cast):
    model = get_peft_model(tiny("llama", dtype=torch.bfloat16), config(), autocast_adapter_dtype=cast)
    model.add_adapter("second", config(seed=9), autocast_adapter_dtype=cast)
    kept = torch.float32 if cast else torch.bfloat16
    assert {p.dtype for n, p in model.named_parameters() if "mixed_rank_factors" in n} == {kept}
    expected = logits(model)
    assert expected.dtype == torch.bfloat16
    small = model.merge_and_unload()
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    # Eight bits of mantissa in factors of 21 layers.
    assert (logits(small) - expected).norm() < 0.05 * expected.norm()


def test_a_quantised_base_is_kept_and_not_merged_into(tmp_path):
    base = in_nf4(tmp_path / "base")
    logits(base)  # bitsandbytes repacks at the first forward
    expected = logits(base)
    model = get_peft_model(base, config(), adapter_name="first")
    adapted = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    model.add_adapter("second", config(seed=9))
    for merge in (model.merge_adapter, lambda: model.merge_and_unload(adapter_names=["first", "second"])):
        with pytest.raises(NotImplementedError, match="cannot be merged into a quantised weight"):
            merge()
    assert torch.equal(logits(model), adapted)
    model.delete_adapter("second")
    torch.testing.assert_close(logits(copy.deepcopy(model).merge_and_unload()), adapted)
    assert torch.equal(logits(model.unload()), expected)


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_quantised_factors_switch_merge_and_come_off(scheme):
    base, settings = tiny("opt"), {"quantize_factors": scheme, "target_modules": ["fc1"]}
    twin, expected = copy.deepcopy(base), logits(base)
    model = get_peft_model(base, config(**settings), adapter_name="first")
    adapted = logits(model)
    with torch.no_grad():
        for path, layer in layers(model).items():
            factors = layer.mixed_rank_factors["first"]
            twin.get_submodule(path).weight.copy_((dense_weight(factors.down) @ dense_weight(factors.up)).T)
    model.add_adapter("second", config(seed=9, **settings))
    model.set_adapter("second")
    assert not torch.allclose(logits(model), adapted, atol=1e-3)
    model.set_adapter("first")
    model.merge_adapter()
    torch.testing.assert_close(logits(model), logits(twin), **FLOATS)
    assert torch.equal(logits(model.unload()), expected)


def test_residuals_of_two_adapters_add_up():
    base = tiny("llama")
    with torch.no_grad():
        for layer in base.model.layers:
            layer.mlp.up_proj.weight.mul_(0.9)
    residual = {"residual": {"reference_model": tiny("llama"), "rank": 8}, "keep_base_weights": False}
    expected = logits(base)
    model = get_peft_model(base, config(target_modules=["up_proj"], **residual), adapter_name="first")
    model.add_adapter("second", config(seed=9, target_modules=["up_proj"], **residual))
    model.base_model.set_adapter(["first", "second"])
    added = copy.deepcopy(base)
    for path, layer in layers(model).items():
        weights = [layer.mixed_rank_factors[name] for name in ("first", "second")]
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
        plain.weight.data = layer.base_layer.weight + sum(f.up.weight @ f.down.weight for f in weights)
        added.set_submodule(path, plain)
    torch.testing.assert_close(logits(model), logits(added), **FLOATS)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), logits(added), **FLOATS)
    assert torch.equal(logits(model.unload()), expected)


def test_different_adapters_in_one_batch_are_refused_by_name():
    model = two_adapters()
    for call in (model, model.generate):
        with pytest.raises(NotImplementedError, match="cannot mix adapter_names in it; call set_adapter"):
            call(input_ids=IDS, adapter_names=["first", "second"])


@pytest.mark.parametrize("kept", [True, False])
def test_whether_the_base_is_kept_is_saved_and_may_be_changed_for_loading(tmp_path, kept):
    model = get_peft_model(tiny("llama"), config(keep_base_weights=kept))
    model.save_pretrained(tmp_path)
    for low_memory in (False, True):
        loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path, low_cpu_mem_usage=low_memory)
        assert {layer.keeps_base for layer in layers(loaded).values()} == {kept}
        assert torch.equal(logits(loaded), logits(model))
    changed = PeftConfig.from_pretrained(tmp_path)
    changed.keep_base_weights = not kept
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path, config=changed)
    assert {layer.keeps_base for layer in layers(loaded).values()} == {not kept}
    assert torch.equal(logits(loaded), logits(model))


def test_dense_weights_are_gone_unless_they_are_kept():
    """By count of what is held: at half of the targets' parameters, 1 and 3 halves of them."""
    of_targets = lambda m: sum(p.numel() for n, p in m.named_parameters() if ".layers." in n and "norm" not in n)
    dense = of_targets(tiny("llama"))
    gone = of_targets(get_peft_model(tiny("llama"), config(keep_base_weights=False)))
    kept = get_peft_model(tiny("llama"), config())
    assert 0.49 * dense < gone <= 0.5 * dense
    assert of_targets(kept) == dense + gone
    assert of_targets(kept.merge_and_unload()) == gone


@pytest.mark.parametrize("kept, scheme", [(True, None), (False, None), (True, "int8")])
def test_init_weights_false_starts_elsewhere(kept, scheme):
    settings = {"keep_base_weights": kept, "quantize_factors": scheme, "target_modules": ["fc1", "out_proj"]}
    usual = get_peft_model(tiny("opt"), config(**settings))
    made = []
    for seed in (0, 0, 1):
        base = tiny("opt")
        torch.manual_seed(seed)
        made.append(get_peft_model(base, config(init_weights=False, **settings)))
    first, again, other = (logits(model) for model in made)
    assert made[0].peft_config["default"].rank_pattern == usual.peft_config["default"].rank_pattern
    assert torch.equal(first, again) and torch.isfinite(first).all()
    for one in (logits(tiny("opt")), logits(usual), other):
        assert (first - one).norm() > 0.5 * one.norm()


def test_init_weights_false_does_not_touch_what_is_loaded(tmp_path):
    model = get_peft_model(tiny("llama"), config(init_weights=False))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny("llama"), tmp_path)), logits(model))


@pytest.mark.parametrize("changes", [{"init_weights": None}, {"init_weights": "random"}, {"keep_base_weights": 1}])
def test_wrong_values_are_named(changes):
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=f"MixedRankConfig.{name} must be True or False, got {value!r}"):
        MixedRankConfig(**changes)


def test_transformers_own_adapter_methods_take_a_second_one():
    model = tiny("llama")
    expected = logits(model)
    model.add_adapter(config(), adapter_name="first")
    adapted = logits(model)
    model.add_adapter(config(seed=9), adapter_name="second")
    assert not torch.allclose(logits(model), adapted, atol=1e-3)
    model.set_adapter("first")
    assert torch.equal(logits(model), adapted)
    model.disable_adapters()
    assert torch.equal(logits(model), expected)


def test_injection_without_memory_leaves_the_factors_empty():
    model = inject_adapter_in_model(config(), tiny("llama"), low_cpu_mem_usage=True)
    for layer in layers(model).values():
        assert {p.device.type for p in layer.mixed_rank_factors.parameters()} == {"meta"}
        assert layer.base_layer.weight.device.type == "cpu"


def test_without_peft_there_is_nothing_to_keep_the_base_in():
    model = tiny("llama")
    before = digest(model)
    with pytest.raises(ValueError, match="keep_base_weights"):
        compress_model(model, config())
    assert digest(model) == before


def test_an_unknown_adapter_is_named_with_and_without_a_base():
    for kept in (True, False):
        model = get_peft_model(tiny("llama"), config(keep_base_weights=kept))
        with pytest.raises(ValueError, match="unknown does not exist"):
            model.delete_adapter("unknown")
    with pytest.raises(NoDenseWeightsError, match="keep_base_weights=True keeps them"):
        model.delete_adapter("default")
