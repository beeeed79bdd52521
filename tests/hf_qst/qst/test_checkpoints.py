"""What a saved side network holds, and that a damaged or foreign one is refused by name."""

import json
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from hf_qst import CheckpointError, QSTConfig
from tests.architectures import CONFIGS, digest, in_nf4, side_network, side_tuned, tiny, token_batch, wake

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


def test_meta_device_loading_gives_equal_logits(saved):
    expected = logits(PeftModel.from_pretrained(tiny("llama"), saved))
    model = PeftModel.from_pretrained(tiny("llama"), saved, low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in model.parameters())
    assert torch.equal(logits(model), expected)


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


def test_model_card_says_how_to_load_once(saved):
    PeftModel.from_pretrained(tiny("llama"), saved).save_pretrained(saved)
    assert (saved / "README.md").read_text().count("import hf_qst") == 1


def test_config_file_round_trips(saved):
    config = QSTConfig(r=4, downsample="lora", mix="paper", gate_shape="vector", modules_to_save=["lm_head"])
    config.save_pretrained(saved)
    loaded = PeftConfig.from_pretrained(saved)
    assert type(loaded) is QSTConfig
    assert loaded == config
    stored = json.loads((saved / "adapter_config.json").read_text())
    assert "calibration_data" not in stored
    assert "target_modules" not in stored


def test_key_of_a_newer_version_gives_one_warning(saved):
    file = saved / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "warp_factor": 9}))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        config = PeftConfig.from_pretrained(saved)
    named = [str(w.message) for w in seen if "warp_factor" in str(w.message)]
    assert len(named) == 1
    assert config.r == 4


def test_truncated_file_is_refused(saved):
    content = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(content[:-100])
    with pytest.raises(Exception, match=r"(?i)incomplete|truncat|invalid|header|checksum"):
        PeftModel.from_pretrained(tiny("llama"), saved)


DAMAGE = {
    "missing": (lambda tensors, name: tensors.pop(name), "is missing"),
    "extra": (lambda tensors, name: tensors.update({name.replace("blocks.1", "blocks.7"): torch.ones(2)}), "blocks.7"),
    "nan": (lambda tensors, name: tensors[name][0].fill_(torch.nan), "NaN"),
    "infinite": (lambda tensors, name: tensors[name][0].fill_(torch.inf), "infinite"),
    "dtype": (lambda tensors, name: tensors.update({name: tensors[name].bfloat16()}), "dtype bfloat16"),
    "shape": (lambda tensors, name: tensors.update({name: tensors[name].T.contiguous()}), "has shape"),
    "flipped_bit": (lambda tensors, name: tensors[name].view(torch.int32)[0, 0].bitwise_xor_(1), "checksum"),
    "zeroed": (lambda tensors, name: tensors[name].zero_(), "checksum"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_damaged_tensor_is_named(saved, damage, low_cpu_mem_usage):
    change, reason = DAMAGE[damage]
    name = rewrite(saved, change)
    with pytest.raises(CheckpointError, match=reason) as error:
        PeftModel.from_pretrained(tiny("llama"), saved, low_cpu_mem_usage=low_cpu_mem_usage)
    assert WEIGHTS in str(error.value)
    assert name.split(".blocks")[0].removeprefix("base_model.model.") in str(error.value)


def test_swapped_tensors_are_refused(saved):
    def swap(tensors, name):
        other = name.replace("blocks.1", "blocks.2")
        tensors[name], tensors[other] = tensors[other], tensors[name]

    rewrite(saved, swap)
    with pytest.raises(CheckpointError, match="checksum"):
        PeftModel.from_pretrained(tiny("llama"), saved)


def test_damaged_second_adapter_is_refused(saved):
    rewrite(saved, DAMAGE["flipped_bit"][0])
    with pytest.raises(CheckpointError, match="checksum"):
        side_tuned("llama").load_adapter(saved, "second")


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_changed_byte_never_loads_as_other_weights(saved, position, flip):
    """A change in the header's padding may go unnoticed; one that changes a weight may not."""
    original = (saved / WEIGHTS).read_bytes()
    content = bytearray(original)
    content[int(position * len(content))] ^= flip
    (saved / WEIGHTS).write_bytes(content)
    try:
        loaded = PeftModel.from_pretrained(tiny("llama"), saved)
    except Exception:
        return
    finally:
        (saved / WEIGHTS).write_bytes(original)
    assert torch.equal(logits(loaded), logits(PeftModel.from_pretrained(tiny("llama"), saved)))


@pytest.mark.parametrize(
    ("base", "both"),
    [
        (lambda: tiny("llama", hidden_size=32), ("hidden_size", "64", "32")),
        (lambda: tiny("llama", num_hidden_layers=2), ("num_hidden_layers", "3", "2")),
        (lambda: tiny("qwen2"), ("model_type", "llama", "qwen2")),
    ],
)
def test_foreign_base_is_named(saved, base, both):
    with pytest.raises(CheckpointError) as error:
        PeftModel.from_pretrained(base(), saved)
    assert all(part in str(error.value) for part in both)


def test_weights_with_nan_are_not_saved(tmp_path):
    model = side_tuned("llama")
    with torch.no_grad():
        side_network(model).upsample.bias[3] = torch.nan
    with pytest.raises(CheckpointError, match=r"upsample\.bias.*cannot be saved"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / WEIGHTS).exists()


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


def test_saving_again_after_training_writes_the_new_manifest(saved):
    model = PeftModel.from_pretrained(tiny("llama"), saved, is_trainable=True)
    with torch.no_grad():
        side_network(model).upsample.bias.add_(1.0)
    model.save_pretrained(saved)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny("llama"), saved)), logits(model))


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
