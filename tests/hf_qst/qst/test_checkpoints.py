"""What a saved side network holds, and that a damaged or foreign one is refused by name."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from hf_qst import QSTConfig
from hf_qst.errors import CheckpointError
from tests.architectures import CONFIGS, digest, in_nf4, side_tuned, tiny, token_batch, wake

WEIGHTS = "adapter_model.safetensors"
IDS = token_batch()


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.fixture
def saved(tmp_path):
    model = side_tuned("llama", awake=True)
    model.save_pretrained(tmp_path)
    return tmp_path


def rewrite(directory, change):
    """Save the adapter's tensors again after `change(tensors, name)`, with the name of one of them."""
    tensors = load_file(directory / WEIGHTS)
    name = next(key for key in tensors if key.endswith("blocks.1.mlp.up_proj.weight"))
    change(tensors, name)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    return name


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_reloaded_adapter_gives_equal_logits(name, tmp_path):
    model = side_tuned(name, awake=True)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(name), tmp_path)), logits(model))


def test_reloaded_adapter_on_nf4_gives_equal_logits(tmp_path):
    base = in_nf4(tmp_path / "base")
    model = side_tuned(model=base, awake=True)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(model.unload(), tmp_path / "adapter")), expected)


@pytest.mark.parametrize("kind", ["linear", "lora", "maxpool", "avgpool", "principal"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_every_downsampler_reloads(kind, low_cpu_mem_usage, tmp_path):
    model = side_tuned("llama", downsample=kind, gate_shape="vector", mix_shape="vector", awake=True)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), logits(model))


def test_file_holds_the_side_network_and_nothing_else(saved):
    model = side_tuned("llama")
    held = load_file(saved / WEIGHTS)
    assert sum(t.numel() for t in held.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert all("qst_net" in name and "base_layer" not in name for name in held)
    assert {t.dtype for t in held.values()} == {torch.float32}
    assert (saved / WEIGHTS).stat().st_size < 4 * sum(t.numel() for t in held.values()) + 20_000
    assert sorted(f.name for f in saved.iterdir()) == ["README.md", "adapter_config.json", WEIGHTS]


def test_config_file_round_trips(saved):
    config = QSTConfig(r=4, downsample="lora", mix="paper", gate_shape="vector", modules_to_save=["lm_head"])
    config.save_pretrained(saved)
    loaded = PeftConfig.from_pretrained(saved)
    assert type(loaded) is QSTConfig
    assert loaded == config
    stored = json.loads((saved / "adapter_config.json").read_text())
    assert "calibration_data" not in stored
    assert "target_modules" not in stored


def test_swapped_tensors_are_refused(saved):
    def swap(tensors, name):
        other = name.replace("blocks.1", "blocks.2")
        tensors[name], tensors[other] = tensors[other], tensors[name]

    rewrite(saved, swap)
    with pytest.raises(CheckpointError, match="checksum"):
        PeftModel.from_pretrained(tiny("llama"), saved)


def train_head(model, name):
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f"{name}.modules_to_save" in key:
                parameter.add_(torch.randn_like(parameter) * 0.1)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_trained_language_model_head_round_trips(tmp_path, low_cpu_mem_usage):
    model = side_tuned("llama", modules_to_save=["lm_head"], awake=True)
    train_head(model, "lm_head")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), logits(model))
    assert any("lm_head" in name for name in PeftConfig.from_pretrained(tmp_path).manifest["tensors"])


def test_trained_classifier_round_trips(tmp_path):
    base = tiny("llama", classifier=True)
    model = wake(side_tuned(task_type="SEQ_CLS", model=tiny("llama", classifier=True), modules_to_save=["score"]))
    train_head(model, "score")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path)), logits(model))


def test_damaged_trained_head_is_named(tmp_path):
    model = side_tuned("llama", modules_to_save=["lm_head"], awake=True)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    name = next(key for key in tensors if "lm_head" in key)
    tensors[name].view(torch.int32)[0, 0].bitwise_xor_(1)
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lm_head"):
        PeftModel.from_pretrained(tiny("llama"), tmp_path)


def test_config_of_a_saved_adapter_starts_a_new_one(saved):
    """Only the settings are taken over: the weights are new and the manifest does not concern them."""
    config = PeftConfig.from_pretrained(saved)
    config.inference_mode = False
    base = tiny("llama")
    expected = logits(base)
    model = get_peft_model(base, config)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(saved)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny("llama"), saved)), expected)


def test_auto_class_loads_base_and_adapter(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "base")
    base = tiny("llama")
    base.config._name_or_path = base.name_or_path = str(tmp_path / "base")
    model = side_tuned(model=base, awake=True)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    assert digest(loaded.get_base_model()) == digest(model.get_base_model())
