"""Folders of reshaped models in NF4 and int8: a head that was not saved is an ordinary layer, and all saves again."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BitsAndBytesConfig,
)

from hf_qst import MixedRankConfig
from hf_qst.errors import CheckpointError
from tests.architectures import NF4, tiny
from tests.reshaped_toys import IDS, load, reshaped, same

pytest.importorskip("bitsandbytes")

HEADS = [AutoModelForSequenceClassification, AutoModelForTokenClassification]
SETTINGS = {"nf4": NF4, "int8": {"load_in_8bit": True}}


@pytest.fixture(scope="module", params=["factors_nf4", "factors_int8", "loaded_nf4", "loaded_int8"])
def folder(request, tmp_path_factory):
    """A causal model quantised by mixed rank, or by loading a reshaped folder in fewer bits."""
    root = tmp_path_factory.mktemp("quantised")
    way, scheme = request.param.split("_")
    if way == "factors":
        config = MixedRankConfig(
            quantize_factors=scheme, calibration_data=[{"input_ids": IDS}], decomposition="plain", progress=False
        )
        get_peft_model(tiny("llama"), config).merge_and_unload().save_pretrained(root / "model")
    else:
        reshaped().save_pretrained(root / "float")
        load(root / "float", quantization_config=BitsAndBytesConfig(**SETTINGS[scheme])).save_pretrained(root / "model")
    return root / "model"


@pytest.mark.parametrize("auto", HEADS)
def test_a_new_head_is_in_floating_point_trains_and_reloads(folder, auto, tmp_path):
    model = auto.from_pretrained(folder, num_labels=3)
    model.config.pad_token_id = 0
    assert type(model.score) is nn.Linear and model.score.weight.dtype == torch.float32
    base = load(folder)
    with torch.no_grad():
        assert torch.equal(model.model(IDS).last_hidden_state, base.model(IDS).last_hidden_state)
    model.eval()(IDS).logits.sum().backward()
    assert model.score.weight.grad.abs().sum() > 0
    with torch.no_grad():
        model.score.weight.add_(1)
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path)
    assert type(again.score) is nn.Linear and torch.equal(again(IDS).logits, model(IDS).logits)
    kinds = [[type(m) for m in part.model.layers.modules()] for part in (again, model, base)]
    assert kinds[0] == kinds[1] == kinds[2]


def test_what_was_loaded_saves_again(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    assert same(load(tmp_path), model)


def test_a_class_that_calls_its_base_otherwise_is_refused_by_name(folder):
    with pytest.raises(CheckpointError, match=r"base model 'model'.*ForQuestionAnswering calls it 'transformer'"):
        AutoModelForQuestionAnswering.from_pretrained(folder)
