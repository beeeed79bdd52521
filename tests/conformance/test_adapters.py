"""What PEFT promises of adapters: where they start, adding, switching, disabling, deleting, unloading, merging, copying."""

import copy
import io
import pickle
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM

from tests.architectures import digest
from tests.conformance.methods import IDS, disturb, logits, small


@contextmanager
def refusal(line, operation, model):
    """The typed refusal, which leaves the model's outputs and adapters as they were."""
    expected, names, structure = logits(model), list(model.peft_config), str(model)
    with pytest.raises(line.refuses[operation]) as caught:
        yield
    assert type(caught.value) is line.refuses[operation] and len(str(caught.value)) > 40
    assert torch.equal(logits(model), expected)
    assert list(model.peft_config) == names and str(model) == structure


def test_a_fresh_adapter_is_the_base_in_function(line):
    base = small()
    expected = logits(base)
    got = logits(line.model(base, **line.identity))
    if line.tolerance == 0:
        assert torch.equal(got, expected)
    else:
        torch.testing.assert_close(got, expected, atol=line.tolerance, rtol=line.tolerance)


def test_init_weights_false_starts_elsewhere(line):
    expected, usual = logits(small()), logits(line.model())
    first, again, other = (logits(line.random(seed=seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again) and torch.isfinite(first).all()
    for one in (expected, usual, other):
        assert not torch.allclose(first, one, atol=1e-2)


def test_only_the_methods_own_weights_train(line):
    model = line.random().train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    own = line.own(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and trained <= own.keys()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name
    count, _ = model.get_nb_trainable_parameters()
    assert count == sum(own[name].numel() for name in trained)


def test_disabled_it_is_the_base(line):
    base = small()
    expected = logits(base)
    model = line.random(base)
    if "disable" in line.refuses:
        with refusal(line, "disable", model), model.disable_adapter():
            pass
        return
    adapted = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), adapted)
    model.train()
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=IDS).logits, expected)


def test_unload_gives_the_base_back(line):
    base = small()
    expected, before, structure = logits(base), digest(base), str(base)
    model = line.random(base)
    if "unload" in line.refuses:
        with refusal(line, "unload", model):
            model.unload()
        return
    assert model.unload() is base
    assert str(base) == structure and digest(base) == before and torch.equal(logits(base), expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
    assert torch.equal(logits(line.random(base)), logits(line.random()))


def test_two_adapters_take_turns_and_one_is_deleted(line):
    model = line.random(adapter_name="first")
    first = logits(model)
    if "second" in line.refuses:
        with refusal(line, "second", model):
            line.load_random(model, "second", 6)
        with refusal(line, "delete", model):
            model.delete_adapter("first")
        return
    line.load_random(model, "second", 6)
    assert model.active_adapters == ["first"] and torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    assert torch.equal(second, logits(line.random(seed=6)))
    model.set_adapter("first")
    assert torch.equal(logits(model), first) and not torch.allclose(first, second, atol=1e-2)
    model.delete_adapter("first")
    assert list(model.peft_config) == ["second"] and not any("first" in name for name in line.own(model))
    model.set_adapter("second")
    assert torch.equal(logits(model), second)
    with pytest.raises(ValueError, match="unknown does not exist"):
        model.delete_adapter("unknown")


def test_training_one_adapter_leaves_the_other(line):
    if "second" in line.refuses:
        return
    model = line.random(adapter_name="first")
    line.load_random(model, "second", 6)
    model.set_adapter("second")
    before = {name: p.detach().clone() for name, p in line.own(model).items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    changed = {name for name, p in line.own(model).items() if not torch.equal(p, before[name])}
    assert changed and all(".second." in f"{name}." for name in changed)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", ["model", "0", "one of its own"])
def test_adapter_names_that_peft_confuses_with_modules_are_refused(line, name, first):
    """PEFT saves an adapter without the tensors whose keys hold another adapter's name between dots."""
    if "second" in line.refuses:
        return
    if name == "one of its own":
        (parameter, *_) = line.own(line.random())
        name = parameter.rpartition(".")[2]
    names = (name, "other") if first else ("other", name)
    model = line.random(adapter_name=names[0])
    expected, structure = logits(model), str(model)
    with pytest.raises(ValueError, match=f"adapter_name must be none of the names .* got '{name}'"):
        line.load_random(model, names[1], 6)
    assert list(model.peft_config) == [names[0]] and str(model) == structure
    assert torch.equal(logits(model), expected)


def test_adapters_are_saved_each_in_its_folder(line, tmp_path):
    if "second" in line.refuses:
        return
    model = line.random(adapter_name="a")
    for seed, name in enumerate(["a_b", "b", "default"]):
        line.load_random(model, name, 6 + seed)
    model.save_pretrained(tmp_path)
    for name in model.peft_config:
        model.set_adapter(name)
        folder = tmp_path if name == "default" else tmp_path / name
        assert torch.equal(logits(PeftModel.from_pretrained(small(), folder)), logits(model))
    both = PeftModel.from_pretrained(small(), tmp_path / "a", adapter_name="one", is_trainable=True)
    both.load_adapter(tmp_path / "b", "two")
    assert any(p.requires_grad for name, p in line.own(both).items() if ".one." in f"{name}.")
    assert not any(p.requires_grad for name, p in line.own(both).items() if ".two." in f"{name}.")
    for name, saved in (("one", "a"), ("two", "b")):
        both.set_adapter(name)
        model.set_adapter(saved)
        assert torch.equal(logits(both), logits(model))


def test_merge_and_unload_keeps_the_function_in_a_plain_model(line, tmp_path):
    model = line.random()
    if "merge_and_unload" in line.refuses:
        with refusal(line, "merge_and_unload", model):
            model.merge_and_unload()
        return
    expected = logits(model)
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
    assert not hasattr(merged, "peft_config")
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(merged))


def test_merging_in_place_keeps_the_function_and_is_undone(line):
    model = line.random()
    if "merge_adapter" in line.refuses:
        for call in (model.merge_adapter, model.unmerge_adapter):
            with refusal(line, "merge_adapter", model):
                call()
        return
    expected = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)


def twins(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch": torch.load(buffer, weights_only=False),
    }


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch"])
def test_copies_are_equal_and_independent(line, how):
    model = line.random()
    expected = logits(model)
    twin = twins(model)[how]
    assert torch.equal(logits(twin), expected)
    disturb(line, twin)
    assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(twin), expected)
    # Hooks of the copy act in the copy: it computes without the original's weights.
    changed = logits(twin)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(twin), changed)


@pytest.mark.parametrize("way", ["PEFT", "transformers"])
def test_on_adapters_of_another_method_it_is_refused(line, way):
    lora = LoraConfig(target_modules=["q_proj"])
    base = small()
    if way == "PEFT":
        base = inject_adapter_in_model(lora, base, "lora")
    else:
        base.add_adapter(lora, adapter_name="lora")
    before = str(base)
    with pytest.raises(ValueError, match=r"adapters of type .*: merge or unload them first") as error:
        if way == "PEFT":
            get_peft_model(base, line.config())
        else:
            base.add_adapter(line.config(), adapter_name="ours")
    assert line.layer_class.alone in str(error.value)
    assert str(base) == before and list(getattr(base, "peft_config", {})) in ([], ["lora"])


def test_rows_of_a_batch_have_their_own_adapters_or_are_refused(line):
    model = line.random().eval()
    names = ["default", "__base__"]
    if not line.mixes:
        for call in (model, model.generate):
            with pytest.raises(NotImplementedError, match="cannot mix adapter_names in it; call set_adapter"):
                call(input_ids=IDS, adapter_names=names)
        return
    line.load_random(model, "second", 6)
    rows = {"default": logits(model)}
    model.set_adapter("second")
    rows["second"] = logits(model)
    with model.disable_adapter():
        rows["__base__"] = logits(model)
    for names in (["default", "second"], ["second", "__base__"], ["second", "second"]):
        with torch.no_grad():
            mixed = model(input_ids=IDS, adapter_names=names, use_cache=False).logits
        for row, name in enumerate(names):
            torch.testing.assert_close(mixed[row], rows[name][row], atol=1e-5, rtol=1e-5)
    generated = model.generate(input_ids=IDS, adapter_names=["second", "default"], max_new_tokens=4)
    assert torch.equal(generated[0], model.generate(input_ids=IDS, max_new_tokens=4)[0])


def test_a_configuration_makes_the_same_adapter_twice(line):
    """The caller's configuration is not used up."""
    config = line.config()
    assert torch.equal(logits(get_peft_model(small(), config)), logits(get_peft_model(small(), config)))


def test_transformers_own_adapter_methods(line, tmp_path):
    base = small()
    expected = logits(base)
    torch.manual_seed(5)
    base.add_adapter(line.config(init_weights=False))
    adapted = logits(base)
    assert torch.equal(adapted, logits(line.random()))
    base.save_pretrained(tmp_path)
    assert "import hf_qst" in (tmp_path / "README.md").read_text()
    other = small()
    other.load_adapter(tmp_path)
    assert torch.equal(logits(other), adapted)
    # The same files serve PEFT's own loader, which checks them against their manifest.
    assert torch.equal(logits(PeftModel.from_pretrained(small(), tmp_path)), adapted)
    if "disable" in line.refuses:
        with pytest.raises(line.refuses["disable"]):
            other.disable_adapters()
        return
    other.disable_adapters()
    assert torch.equal(logits(other), expected)
    other.enable_adapters()
    assert torch.equal(logits(other), adapted)


def test_generation_uses_the_adapter(line):
    model = line.random().eval()
    tokens = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    for position in range(IDS.shape[1], tokens.shape[1]):
        with torch.no_grad():
            expected = model(input_ids=tokens[:, :position], use_cache=False).logits[:, -1].argmax(-1)
        alive = (tokens[:, IDS.shape[1] : position] != model.config.eos_token_id).all(1)
        assert torch.equal(tokens[alive, position], expected[alive])
