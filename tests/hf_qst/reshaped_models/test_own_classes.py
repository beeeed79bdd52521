"""Subclasses and modules of a user's own: they come back as what they were, or are refused by name."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

from hf_qst import DISPConfig, MixedRankConfig
from hf_qst.reshaped_models import ReshapedModelError, reshape_model, reshaped_class, to_dense
from tests.architectures import tiny
from tests.reshaped_toys import IDS, Factorised, load, outputs, reshaped, same


class Negated(LlamaForCausalLM):
    """Computes something else from the same weights."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = -output.logits
        return output


class SameName(Negated):
    pass


SameName.__name__ = SameName.__qualname__ = "LlamaForCausalLM"


def small(kind):
    torch.manual_seed(0)
    model = kind(tiny("llama").config).eval()
    torch.manual_seed(3)
    model.model.layers[0].mlp.up_proj = Factorised(model.model.layers[0].mlp.up_proj, 3)
    return reshape_model(model)


@pytest.mark.parametrize("kind", [Negated, SameName])
def test_a_subclass_is_loaded_by_itself_and_by_no_class_of_transformers(kind, tmp_path):
    model = small(kind)
    model.save_pretrained(tmp_path)
    for auto in (AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification):
        with pytest.raises(ReshapedModelError, match=rf"{kind.__module__}\.{kind.__name__}.*reshaped_class"):
            auto.from_pretrained(tmp_path)
    again = reshaped_class(kind).from_pretrained(tmp_path)
    assert same(again, model) and type(again) is type(model)
    assert type(to_dense(again)) is kind
    card = (tmp_path / "README.md").read_text()
    assert f"reshaped_class({kind.__name__}).from_pretrained" in card and f"from {kind.__module__} import" in card


def test_a_folder_that_has_the_class_by_name_alone_is_refused_too(tmp_path):
    small(Negated).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["saved_class"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ReshapedModelError, match="class Negated"):
        load(tmp_path)


def test_weights_of_transformers_classes_load_into_a_subclass(tmp_path):
    model = reshaped()
    model.save_pretrained(tmp_path)
    logits = outputs(reshaped_class(Negated).from_pretrained(tmp_path))["logits"]
    assert torch.equal(logits, -outputs(model)["logits"])


@pytest.mark.parametrize(
    ("path", "module"),
    [("layers.1.mlp.act_fn", nn.ReLU()), ("layers.1", nn.Identity()), ("norm", nn.RMSNorm(64))],
)
def test_a_module_that_would_come_back_as_another_is_named(path, module):
    model = tiny("llama")
    model.model.layers[0].mlp.up_proj = Factorised(model.model.layers[0].mlp.up_proj, 3)
    model.model.set_submodule(path, module)
    with pytest.raises(ReshapedModelError, match=rf"model\.{path}|tensor 'model\.{path}"):
        reshape_model(model)


def test_a_merged_model_is_not_that_of_the_folder_its_base_came_from(tmp_path):
    """PEFT looks up the config there when it saves an adapter, and the model when it loads one."""
    tiny("llama").save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    merged = get_peft_model(base, DISPConfig(keep_ratio=0.5)).merge_and_unload()
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(merged, lora).eval()
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    expected = model(input_ids=IDS).logits
    unwrapped = model.unload()
    again = PeftModel.from_pretrained(unwrapped, tmp_path / "adapter").eval()
    assert torch.equal(again(input_ids=IDS).logits, expected)


class WithArgument(Negated):
    def __init__(self, config, argument):
        super().__init__(config)


def test_a_class_that_needs_more_than_a_config_is_named():
    model = WithArgument(tiny("llama").config, 1)
    model.model.layers[0].mlp.up_proj = Factorised(model.model.layers[0].mlp.up_proj, 3)
    with pytest.raises(ReshapedModelError, match=r"WithArgument cannot be built from its config alone.*argument"):
        reshape_model(model)


@pytest.mark.parametrize(
    "config",
    [
        DISPConfig(keep_ratio=0.5),
        MixedRankConfig(decomposition="plain", calibration_data=[{"input_ids": IDS}], progress=False),
    ],
)
def test_a_pruned_or_compressed_subclass_stays_the_function_it_is(config, tmp_path):
    merged = get_peft_model(Negated(tiny("llama").config).eval(), config).merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert same(reshaped_class(Negated).from_pretrained(tmp_path), merged)
    with pytest.raises(ReshapedModelError, match="Negated"):
        load(tmp_path)
