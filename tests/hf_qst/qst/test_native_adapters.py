"""transformers' own adapter methods, which build no PEFT model and never call the tuner."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from hf_qst import QSTConfig
from tests.architectures import CONFIGS, side_layers, side_tuned, tiny, token_batch, wake

IDS = token_batch()
WEIGHTS = "adapter_model.safetensors"


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.fixture
def saved(tmp_path):
    """A base and an adapter of it on disk, and the adapter's logits."""
    base = tiny("llama")
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    model = side_tuned(model=base, awake=True)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path, logits(model)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_added_adapter_round_trips(name, tmp_path):
    model = tiny(name)
    base = logits(model)
    model.add_adapter(QSTConfig(r=4, downsample_rank=4))
    assert torch.equal(logits(model), base)
    wake(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert "import hf_qst" in (tmp_path / "README.md").read_text()
    fresh = tiny(name)
    fresh.load_adapter(tmp_path)
    assert torch.equal(logits(fresh), expected)
    # The same files serve PEFT's own loader, which checks them against their manifest.
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(name), tmp_path)), expected)


def test_auto_model_finds_base_and_adapter(saved):
    directory, expected = saved
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(directory / "adapter")), expected)


def test_switched_and_deleted_adapters(saved):
    directory, expected = saved
    model = tiny("llama")
    base = logits(model)
    model.load_adapter(directory / "adapter", adapter_name="one")
    model.add_adapter(QSTConfig(r=2), adapter_name="two")
    assert torch.equal(logits(model), base)
    model.set_adapter("one")
    assert torch.equal(logits(model), expected)
    model.delete_adapter("two")
    assert list(side_layers(model)[0].qst_net) == ["one"]
    assert torch.equal(logits(model), expected)


def test_generation_uses_the_side_network(saved):
    directory, _ = saved
    model = tiny("llama")
    plain = model.generate(input_ids=IDS, max_new_tokens=8, min_new_tokens=8)
    model.load_adapter(directory / "adapter")
    tuned = model.generate(input_ids=IDS, max_new_tokens=8, min_new_tokens=8)
    reference = side_tuned(model=tiny("llama"))
    reference.load_adapter(directory / "adapter", "saved")
    reference.set_adapter("saved")
    assert torch.equal(tuned, reference.generate(input_ids=IDS, max_new_tokens=8, min_new_tokens=8))
    assert not torch.equal(tuned, plain)


def test_trained_head_round_trips(tmp_path):
    model = tiny("llama")
    model.add_adapter(QSTConfig(r=4, modules_to_save=["lm_head"]))
    wake(model)
    with torch.no_grad():
        model.lm_head.modules_to_save["default"].weight.add_(0.1)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny("llama"), tmp_path)), expected)
    fresh = tiny("llama")
    fresh.load_adapter(tmp_path)
    assert torch.equal(logits(fresh), expected)


def test_weights_changed_after_loading_are_no_damage(saved):
    directory, _ = saved
    model = tiny("llama")
    model.load_adapter(directory / "adapter")
    wake(model, seed=5)
    changed = logits(model)
    other = tiny("llama")
    other.load_adapter(directory / "adapter")
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), changed)


def test_writing_that_raises_no_version_is_no_damage_in_an_adapter_loaded_for_inference(saved):
    directory, expected = saved
    model = tiny("llama")
    model.load_adapter(directory / "adapter")
    for layer in side_layers(model):
        for parameter in layer.qst_net.parameters():
            parameter.data.mul_(1.5)
    assert not torch.equal(logits(model), expected)
    model = tiny("llama")
    model.load_adapter(directory / "adapter")
    assert torch.isfinite(logits(model.bfloat16().float())).all()


def test_cast_after_loading_is_no_damage(saved):
    directory, expected = saved
    model = tiny("llama")
    model.load_adapter(directory / "adapter")
    assert torch.isfinite(logits(model.bfloat16())).all()
    model = tiny("llama", dtype=torch.bfloat16)
    model.load_adapter(directory / "adapter")
    torch.testing.assert_close(logits(model).float(), expected, atol=0.25, rtol=0.1)


def test_fresh_adapter_with_the_settings_of_a_saved_one_is_no_damage(saved):
    directory, _ = saved
    config = PeftConfig.from_pretrained(directory / "adapter")
    model = tiny("llama")
    base = logits(model)
    model.add_adapter(config)
    assert torch.equal(logits(model), base)
    assert torch.equal(logits(get_peft_model(tiny("llama"), config)), base)


def test_resized_embeddings_round_trip(saved):
    """transformers writes the new embeddings beside the side network, after the manifest."""
    directory, _ = saved
    models = [AutoModelForCausalLM.from_pretrained(directory / "base") for _ in range(2)]
    for model in models:
        model.resize_token_embeddings(110)
    models[0].add_adapter(QSTConfig(r=4))
    wake(models[0])
    models[0].save_pretrained(directory / "resized")
    loaded = PeftModel.from_pretrained(models[1], directory / "resized")
    assert torch.equal(logits(loaded), logits(models[0]))


@pytest.mark.parametrize("target", [["q_proj"], ["lm_head"], "all-linear"])
@pytest.mark.parametrize("way", ["native", "peft_then_native", "get_peft_model", "loaded"])
def test_another_method_on_top_of_a_side_network_is_refused(way, target, tmp_path):
    model = tiny("llama")
    if way == "peft_then_native":
        side_tuned(model=model, awake=True)
    else:
        model.add_adapter(QSTConfig(r=4), "side")
        wake(model)
    expected, names = logits(model), [name for name, _ in model.named_parameters()]
    lora = LoraConfig(target_modules=target)
    if way == "loaded":
        get_peft_model(tiny("llama"), lora).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"runs its base without gradients.*'LORA' cannot be added.*unload\(\)"):
        if way == "get_peft_model":
            get_peft_model(model, lora)
        elif way == "loaded":
            model.load_adapter(tmp_path, adapter_name="lora")
        else:
            model.add_adapter(lora, "lora")
    assert [name for name, _ in model.named_parameters()] == names
    assert "lora" not in model.peft_config
    assert torch.equal(logits(model), expected)


def test_another_method_after_unloading():
    model = side_tuned("llama", awake=True).unload()
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    assert any("lora_A" in name for name, _ in model.named_parameters())


def test_configurations_of_a_wrapped_model_are_copied():
    model = tiny("llama")
    model.add_adapter(QSTConfig(r=4), "side")
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again.peft_config == model.peft_config
        with pytest.raises(ValueError, match="'LORA' cannot be added"):
            again.add_adapter(LoraConfig(target_modules=["q_proj"]), "lora")
