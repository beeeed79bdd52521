"""Adapters with a trained head, new tokens and saved embedding layers load again."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from hf_qst import QSTConfig
from hf_qst.errors import CheckpointError
from hf_qst.saved.manifest import describe
from tests.architectures import digest, tiny, wake

WEIGHTS = "adapter_model.safetensors"
IDS = torch.arange(84, 100)[None]


def settings(head):
    return {"task_type": "CAUSAL_LM", "r": 4, "downsample_rank": 4, "modules_to_save": ["lm_head"] if head else None}


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def load(request, tmp_path):
    """Loads a base and gives it four new tokens, random ones for each seed."""
    tiny("llama", tie_word_embeddings=request.param).save_pretrained(tmp_path / "base")

    def load(seed=1):
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(seed)
        model.resize_token_embeddings(100)
        return model

    return load


def trained(load, head):
    model = wake(get_peft_model(load(), QSTConfig(**settings(head))))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def loaded(directory, load, how, head):
    if how == "second":
        model = get_peft_model(load(), QSTConfig(**settings(head)))
        before = logits(model)
        model.load_adapter(directory, "second")
        if head:  # the embeddings are the base's; the first adapter's head is its own
            first = dict(model.named_parameters())["base_model.model.lm_head.modules_to_save.default.weight"]
            assert torch.equal(first, load().lm_head.weight)
        else:
            assert torch.equal(logits(model), before)
        model.set_adapter("second")
        return model
    arguments = {"renamed": {"adapter_name": "other"}, "meta": {"low_cpu_mem_usage": True}}.get(how, {})
    return PeftModel.from_pretrained(load(), directory, **arguments)


@pytest.mark.parametrize("how", ["plain", "renamed", "meta", "second"])
@pytest.mark.parametrize("layers", [True, "auto", False])
@pytest.mark.parametrize("head", [False, True], ids=["frozen_head", "trained_head"])
def test_saved_adapter_loads_and_gives_equal_logits(load, head, layers, how, tmp_path):
    model = trained(load, head)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=layers)
    assert torch.equal(logits(loaded(tmp_path / "adapter", load, how, head)), logits(model))


@pytest.mark.parametrize("layers", [True, "auto"])
@pytest.mark.parametrize("head", [False, True], ids=["frozen_head", "trained_head"])
def test_new_tokens_travel_with_the_adapter(load, head, layers, tmp_path):
    """Onto a base whose new tokens are others."""
    model = trained(load, head)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=layers)
    again = PeftModel.from_pretrained(load(seed=2), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again.unload()), logits(load(seed=2)))


def test_a_trained_tied_head_leaves_the_embeddings_alone(load):
    model = trained(load, head=True).train()
    before = digest(model, skip="modules_to_save")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    head = dict(model.named_parameters())["base_model.model.lm_head.modules_to_save.default.weight"]
    assert head.grad.abs().max() > 0
    embeddings = model.get_input_embeddings().weight.clone()
    optimizer.step()
    assert torch.equal(model.get_input_embeddings().weight, embeddings)
    assert digest(model, skip="modules_to_save") != before  # the side network


def test_file_with_a_head_twice_loads(load, tmp_path):
    """As earlier versions wrote it, with the adapter's name in the second key and in the manifest."""
    model = trained(load, head=True)
    directory = tmp_path / "adapter"
    model.save_pretrained(directory, save_embedding_layers=True)
    tensors = load_file(directory / WEIGHTS)
    name = "base_model.model.lm_head.modules_to_save.default.weight"
    assert name not in tensors
    tensors[name] = tensors["base_model.model.lm_head.weight"].clone()
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((directory / "adapter_config.json").read_text())
    config["manifest"]["tensors"][name.removeprefix("base_model.model.")] = describe(tensors[name])
    (directory / "adapter_config.json").write_text(json.dumps(config))
    for how in ("plain", "renamed", "second"):
        assert torch.equal(logits(loaded(directory, load, how, head=True)), logits(model))


def test_damaged_head_is_still_named(load, tmp_path):
    trained(load, head=True).save_pretrained(tmp_path, save_embedding_layers=True)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["base_model.model.lm_head.weight"][0, 0] += 1
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight.*checksum"):
        PeftModel.from_pretrained(load(), tmp_path)
