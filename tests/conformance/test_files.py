"""What is saved loads as it was, also in another process; what is damaged or foreign is refused by name."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from hf_qst.errors import CheckpointError
from tests.architectures import tiny
from tests.conformance.methods import IDS, LINES, disturb, logits, small

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def with_peft(folder, base=None, **arguments):
    return PeftModel.from_pretrained(small() if base is None else base, folder, **arguments)


def with_transformers(folder, base=None, **arguments):
    model = small() if base is None else base
    model.load_adapter(str(folder), **arguments)
    return model


LOADERS = {"PEFT": with_peft, "transformers": with_transformers}


@pytest.fixture(params=LOADERS)
def load(request):
    return LOADERS[request.param]


@pytest.fixture
def saved(line, tmp_path):
    line.random().save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder, change) -> str:
    """Save the adapter's tensors again after `change(tensors, name)`, with the name of the largest of them."""
    tensors = load_file(folder / WEIGHTS)
    name = max(tensors, key=lambda key: tensors[key].numel())
    change(tensors, name)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return name


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_reloaded_adapter_is_equal(line, load, saved, low_cpu_mem_usage):
    expected = logits(line.random())
    loaded = load(saved, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not any(p.is_meta for p in loaded.parameters())
    assert torch.equal(logits(loaded), expected)
    assert not any(p.requires_grad for p in loaded.parameters())
    trainable = load(saved, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True)
    assert torch.equal(logits(trainable), expected)
    assert any(p.requires_grad for p in line.own(trainable).values())


def test_the_folder_holds_the_methods_own_tensors_and_says_how_to_load_them(line, saved):
    held = load_file(saved / WEIGHTS)
    assert held and all(line.container in name.split(".") and "base_layer" not in name for name in held)
    assert sorted(file.name for file in saved.iterdir()) == ["README.md", CONFIG, WEIGHTS]
    with_peft(saved).save_pretrained(saved)
    text = (saved / "README.md").read_text()
    assert text.count("import hf_qst") == 1 and line.config_class.card_remark in text


LOAD = """
import sys
from pathlib import Path
import hf_qst
import torch
from peft import AutoPeftModelForCausalLM
ids = torch.load(sys.argv[1])
for folder in map(Path, sys.argv[2:]):
    with torch.no_grad():
        logits = AutoPeftModelForCausalLM.from_pretrained(folder).eval()(input_ids=ids, use_cache=False).logits
    torch.save(logits, folder / "logits")
"""


def test_every_adapter_loads_in_a_new_process(tmp_path):
    small().save_pretrained(tmp_path / "base")
    torch.save(IDS, tmp_path / "ids")
    expected = {}
    for name, line in LINES.items():
        base = small()
        base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
        model = line.random(base)
        expected[name] = logits(model)
        model.save_pretrained(tmp_path / name)
        here = AutoPeftModelForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(logits(here), expected[name])
    arguments = [str(tmp_path / name) for name in ("ids", *LINES)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", LOAD, *arguments], check=True, env=environment)
    for name in LINES:
        torch.testing.assert_close(torch.load(tmp_path / name / "logits"), expected[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "both"),
    [
        ({"hidden_size": 32, "head_dim": 16}, ("hidden_size", "64", "32")),
        ({"num_hidden_layers": 1}, ("num_hidden_layers", "2", "1")),
        ({"num_hidden_layers": 3}, ("num_hidden_layers", "2", "3")),
        ({"name": "qwen2"}, ("model_type", "llama", "qwen2")),
    ],
    ids=["width", "fewer layers", "more layers", "type"],
)
def test_another_base_is_named(line, load, saved, changes, both):
    base = tiny(**{"name": "llama", "num_hidden_layers": 2, **changes})
    before = str(base)
    with pytest.raises(CheckpointError) as error:
        load(saved, base)
    assert all(part in str(error.value) for part in both)
    assert str(base) == before


def _rename(tensors, name):
    tensors[f"{name}_2"] = tensors.pop(name)


def _swap(tensors, name):
    tensors[name] = tensors[name].flip(0).contiguous()


# What is done to the file, what the error says, and whether transformers' own loader shows it to a method.
DAMAGE = {
    "missing": (lambda tensors, name: tensors.pop(name), "is missing", True),
    "extra": (lambda tensors, name: tensors.update({f"{name}_2": torch.ones(2)}), "_2.*not in its manifest", False),
    "renamed": (_rename, "is missing", True),
    "nan": (lambda tensors, name: tensors[name].view(-1)[:1].fill_(torch.nan), "NaN", True),
    "infinite": (lambda tensors, name: tensors[name].view(-1)[:1].fill_(torch.inf), "infinite", True),
    "dtype": (lambda tensors, name: tensors.update({name: tensors[name].bfloat16()}), "dtype bfloat16", False),
    "shape": (lambda tensors, name: tensors.update({name: tensors[name][None].contiguous()}), "has shape", False),
    "flipped bit": (
        lambda tensors, name: tensors[name].view(torch.int32).view(-1)[:1].bitwise_xor_(1),
        "checksum",
        True,
    ),
    "zeroed": (lambda tensors, name: tensors[name].zero_(), "checksum", True),
    "other order": (_swap, "checksum", True),
}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_tensor_is_named(line, saved, damage, low_cpu_mem_usage):
    change, reason, _ = DAMAGE[damage]
    name = rewrite(saved, change)
    with pytest.raises(CheckpointError, match=reason) as error:
        with_peft(saved, low_cpu_mem_usage=low_cpu_mem_usage)
    assert WEIGHTS in str(error.value) and name.removeprefix("base_model.model.") in str(error.value)


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("damage", [name for name, (*_, shown) in DAMAGE.items() if shown])
def test_transformers_loader_does_not_run_a_damaged_adapter(line, saved, damage, is_trainable):
    change, reason, _ = DAMAGE[damage]
    if reason == "is missing" and len(load_file(saved / WEIGHTS)) == 1:
        return  # without any tensor it looks like an adapter that is filled in another way; transformers reports it
    name = rewrite(saved, change)
    model = with_transformers(saved, is_trainable=is_trainable)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=reason) as error:
            model(input_ids=IDS, labels=IDS)
    assert WEIGHTS in str(error.value) and name.rpartition(f"{line.container}.")[2] in str(error.value)


def test_a_damaged_second_adapter_is_refused(line, saved):
    if "second" in line.refuses:
        return
    rewrite(saved, DAMAGE["flipped bit"][0])
    model = line.random()
    with pytest.raises(CheckpointError, match="checksum"):
        model.load_adapter(saved, "second")


def test_a_cut_file_is_refused(line, load, saved):
    content = (saved / WEIGHTS).read_bytes()
    for length in (len(content) - 100, 100, 0):
        (saved / WEIGHTS).write_bytes(content[:length])
        with pytest.raises(Exception, match=r"(?i)incomplete|truncat|invalid|header|checksum|too small"):
            load(saved)


def edit(folder, change) -> None:
    values = json.loads((folder / CONFIG).read_text())
    change(values)
    (folder / CONFIG).write_text(json.dumps(values))


def test_an_edited_manifest_is_refused(line, saved):
    edit(saved, lambda values: values["manifest"]["tensors"].popitem())
    with pytest.raises(CheckpointError, match="is not in its manifest"):
        with_peft(saved)


def test_an_edited_setting_is_named(line, load, saved):
    edit(saved, lambda values: values.update(init_weights=not values["init_weights"]))
    with pytest.raises(CheckpointError, match=f"{CONFIG}: init_weights is .*, which is not what was saved"):
        load(saved)


def test_where_the_base_lies_may_be_edited(line, load, saved):
    expected = logits(load(saved))
    edit(saved, lambda values: values.update(base_model_name_or_path="elsewhere", revision="main"))
    assert torch.equal(logits(load(saved)), expected)


def test_a_setting_is_changed_on_purpose_in_memory(line, saved, tmp_path):
    config = PeftConfig.from_pretrained(saved)
    config.init_weights = not config.init_weights
    model = PeftModel.from_pretrained(small(), saved, config=config)
    model.save_pretrained(tmp_path / "again")
    assert PeftConfig.from_pretrained(tmp_path / "again").init_weights == config.init_weights
    assert torch.equal(logits(with_peft(tmp_path / "again")), logits(with_peft(saved)))


def test_an_edited_setting_of_an_older_file_that_changes_shapes_is_refused(line, saved):
    """Files of version 0.1 hold no checksums of their settings."""
    if line.edit is None:
        return
    edit(saved, lambda values: values["manifest"].pop("settings"))
    edit(saved, line.edit)
    with pytest.raises(CheckpointError, match=r"the configuration asks for|rank_pattern says"):
        with_peft(saved)


def test_a_cut_configuration_is_refused(line, load, saved):
    text = (saved / CONFIG).read_text()
    (saved / CONFIG).write_text(text[: len(text) // 2])
    with pytest.raises(ValueError):
        load(saved)


def test_weights_with_nan_are_not_saved(line, tmp_path):
    model = line.random()
    name, parameter = next(iter(line.own(model).items()))
    parameter.data.view(-1)[:1] = torch.nan
    with pytest.raises(CheckpointError, match="NaN or infinite values and cannot be saved") as error:
        model.save_pretrained(tmp_path)
    assert name.replace(".default", "").removeprefix("base_model.model.") in str(error.value)
    assert not (tmp_path / WEIGHTS).exists()


def test_saving_again_after_training_writes_the_new_manifest(line, saved):
    model = with_peft(saved, is_trainable=True)
    disturb(line, model)
    model.save_pretrained(saved)
    assert torch.equal(logits(with_peft(saved)), logits(model))


def test_a_configuration_saved_by_itself_vouches_for_no_other_weights(line, saved, tmp_path):
    """The weights beside it may be written by another way, after more training."""
    model = with_peft(saved, is_trainable=True)
    get_peft_model_state_dict(model)
    model.save_pretrained(tmp_path / "second")
    disturb(line, model)
    model.peft_config["default"].save_pretrained(tmp_path / "third")
    save_file(get_peft_model_state_dict(model), tmp_path / "third" / WEIGHTS)
    assert torch.equal(logits(with_peft(tmp_path / "third")), logits(model))
    # Beside the very file that it was loaded with, it keeps what is known of it.
    again = PeftConfig.from_pretrained(saved)
    again.save_pretrained(saved)
    assert PeftConfig.from_pretrained(saved).manifest == again.manifest is not None


def test_weights_changed_after_loading_are_no_damage(line, saved):
    model = with_transformers(saved, is_trainable=True)
    disturb(line, model)
    assert torch.isfinite(logits(model)).all()
    cast = with_transformers(saved).to(torch.bfloat16)
    assert torch.isfinite(logits(cast)).all()


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(position=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_changed_byte_never_loads_as_other_weights(line, saved, position, flip):
    """A change in the header's padding may go unnoticed; one that changes a weight may not."""
    original = (saved / WEIGHTS).read_bytes()
    content = bytearray(original)
    content[int(position * len(content))] ^= flip
    (saved / WEIGHTS).write_bytes(content)
    try:
        loaded = with_peft(saved)
    except Exception:
        return
    finally:
        (saved / WEIGHTS).write_bytes(original)
    assert torch.equal(logits(loaded), logits(with_peft(saved)))
