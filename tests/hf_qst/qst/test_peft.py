"""Every door PEFT has to an adapter: adding, switching, disabling, deleting, unloading, copying."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training

from tests.architectures import (
    CONFIGS,
    digest,
    in_nf4,
    side_config,
    side_layers,
    side_network,
    side_tuned,
    tiny,
    token_batch,
    wake,
)

IDS = token_batch()


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def hooks_in(model):
    return sum(
        len(getattr(module, kind))
        for module in model.modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks")
    )


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_disabled_adapter_is_the_base(name):
    base = tiny(name)
    expected = logits(base)
    model = side_tuned(model=base, awake=True)
    assert not torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_unload_gives_the_base_back(name):
    base = tiny(name)
    expected, before, hooks = logits(base), digest(base), hooks_in(base)
    structure = str(base)
    unloaded = side_tuned(model=base, awake=True).unload()
    assert unloaded is base
    assert str(unloaded) == structure
    assert hooks_in(unloaded) == hooks
    assert digest(unloaded) == before
    assert torch.equal(logits(unloaded), expected)


def test_unload_of_a_4bit_base_leaves_no_hook(tmp_path):
    base = in_nf4(tmp_path)
    expected, hooks = logits(base), hooks_in(base)
    unloaded = side_tuned(model=base, awake=True).unload()
    assert hooks_in(unloaded) == hooks
    assert torch.equal(logits(unloaded), expected)


@pytest.fixture
def two_saved(tmp_path):
    """Two adapters saved from separate models, with the logits of each."""
    expected = {}
    for seed, name in enumerate(("first", "second")):
        model = wake(side_tuned("llama", r=4 if name == "first" else 2), seed=seed)
        expected[name] = logits(model)
        model.save_pretrained(tmp_path / name)
    return tmp_path, expected


def test_two_adapters_equal_separately_loaded_ones(two_saved):
    directory, expected = two_saved
    model = PeftModel.from_pretrained(tiny("llama"), directory / "first", adapter_name="first")
    model.load_adapter(directory / "second", "second")
    for name in ("first", "second", "first"):
        model.set_adapter(name)
        assert torch.equal(logits(model), expected[name])


def test_new_adapter_beside_a_trained_one_starts_at_the_base():
    base = tiny("llama")
    expected = logits(base)
    model = side_tuned(model=base, awake=True)
    trained = logits(model)
    model.add_adapter("fresh", side_config())
    model.set_adapter("fresh")
    assert torch.equal(logits(model), expected)
    model.set_adapter("default")
    assert torch.equal(logits(model), trained)


def test_training_a_module_inside_the_base_is_refused():
    with pytest.raises(ValueError, match="embed_tokens"):
        get_peft_model(tiny("llama"), side_config(modules_to_save=["embed_tokens"]))


def test_resized_embeddings_reach_the_base():
    base = tiny("llama")
    model = side_tuned(model=base, awake=True)
    base.resize_token_embeddings(100)
    assert logits(model).shape[-1] == 100
    assert base.get_input_embeddings() is side_layers(model)[0].base_layer.embed_tokens
    assert list(side_layers(model)[0]._modules) == ["base_layer", "qst_net"]


def test_output_hidden_states_have_the_mix_last():
    model = side_tuned("llama", awake=True).eval()
    with torch.no_grad():
        out = model(input_ids=IDS, output_hidden_states=True)
    assert len(out.hidden_states) == 4
    assert torch.equal(model.get_output_embeddings()(out.hidden_states[-1]), out.logits)


def test_tuple_output_equals_the_named_one():
    model = side_tuned("llama", awake=True).eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS, return_dict=False)[0], model(input_ids=IDS).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("autocast", [True, False])
def test_adapters_have_the_dtype_that_peft_promises(dtype, autocast, tmp_path):
    """float32, or that of the base where the caller says so; then for gates and mix too, also while training."""
    expected = torch.float32 if autocast else dtype
    model = get_peft_model(
        tiny("llama", dtype=dtype), side_config(downsample="principal"), autocast_adapter_dtype=autocast
    )
    model.add_adapter("second", side_config(downsample="principal"), autocast_adapter_dtype=autocast)
    wake(model)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path / "second", "third", autocast_adapter_dtype=autocast)
    for name in ("default", "second", "third"):
        model.set_adapter(name)
        loss = model.train()(input_ids=IDS, labels=IDS).loss
        loss.backward()
        parameters = dict(side_network(model, name).named_parameters())
        assert {p.dtype for p in parameters.values()} == {expected}
        trained = {key: p for key, p in parameters.items() if p.requires_grad}
        assert all(p.grad.isfinite().all() for p in trained.values())
        assert trained["gates.1.value"].grad != 0
    exact = wake(get_peft_model(tiny("llama"), side_config(downsample="principal")))
    reference = side_network(exact)
    reference.load_state_dict(side_network(model, "third").float().state_dict())
    torch.testing.assert_close(loss, exact.train()(input_ids=IDS, labels=IDS).loss, atol=0.05, rtol=0.02)


def test_refused_settings_leave_the_model_as_it_was():
    base = tiny("llama")
    expected = logits(base)
    with pytest.raises(ValueError, match="calibration_data must hold at least one batch"):
        get_peft_model(base, side_config(downsample="principal", calibration_data=[]))
    assert side_layers(base) == []
    assert not any(module._forward_hooks for module in base.modules())
    assert torch.equal(logits(base), expected)
    assert torch.equal(logits(get_peft_model(base, side_config())), expected)


def test_parameter_counts_are_reported():
    model = side_tuned("llama")
    trainable, total = model.get_nb_trainable_parameters()
    side = sum(p.numel() for p in side_network(model).parameters())
    assert trainable == side
    assert total == side + sum(p.numel() for p in tiny("llama").parameters())


def test_threads_do_not_see_each_others_states():
    model = side_tuned("llama", awake=True).eval()
    batches = [token_batch(2, 12, seed=seed) for seed in range(12)]

    def run(ids):
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits

    expected = [run(ids) for ids in batches]
    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(run, batches))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_failed_forward_leaves_nothing_behind():
    model = side_tuned("llama", awake=True)
    expected = logits(model)
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[500]]))
    assert side_layers(model)[0].tape.current is None
    assert torch.equal(logits(model), expected)


def test_base_prepared_for_kbit_training_trains(tmp_path):
    model = side_tuned(model=prepare_model_for_kbit_training(in_nf4(tmp_path)), awake=True).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in side_network(model).parameters())
    assert all(p.grad is None for name, p in model.named_parameters() if "qst_net" not in name)
