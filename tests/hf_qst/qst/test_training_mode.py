"""What acts only in training mode: NEFTune's noise, dropout of the base, losses of the base and of frozen adapters."""

import logging

import pytest
import torch
from transformers.integrations.neftune import neftune_post_forward_hook

from hf_qst import QSTConfig
from tests.architectures import CONFIGS, side_config, side_network, side_tuned, tiny, token_batch, wake
from tests.trainers import plain_trainer

IDS = token_batch()


def without_side_dropout(name):
    """GPT-2's configuration has attention dropout, which the side blocks follow."""
    return tiny(name, attn_pdrop=0.0) if name == "gpt2" else tiny(name)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_noise_on_the_embeddings_reaches_the_loss(name):
    model = side_tuned(model=without_side_dropout(name), awake=True).train()
    embeddings = model.get_base_model().get_input_embeddings()
    embeddings.neftune_noise_alpha = 50.0
    seen = []
    handles = [
        embeddings.register_forward_hook(neftune_post_forward_hook),
        embeddings.register_forward_hook(lambda module, args, output: seen.append(output.detach())),
    ]
    noisy = model(input_ids=IDS, labels=IDS).loss
    for handle in handles:
        handle.remove()
    plain = model(input_ids=IDS, labels=IDS).loss
    torch.testing.assert_close(noisy, model(inputs_embeds=seen[0], labels=IDS).loss)
    assert abs(noisy - plain) > 1e-3


def test_noise_is_off_in_evaluation():
    model = side_tuned("llama", awake=True)
    embeddings = model.get_base_model().get_input_embeddings()
    expected = model.eval()(input_ids=IDS).logits
    embeddings.neftune_noise_alpha = 50.0
    embeddings.register_forward_hook(neftune_post_forward_hook)
    assert not torch.equal(model.train()(input_ids=IDS).logits, expected)
    assert torch.equal(model.eval()(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("native", [False, True])
def test_trainers_setting_acts(native, tmp_path):
    losses = []
    for alpha in (None, 50.0):
        model = tiny("llama")
        if native:
            torch.manual_seed(0)
            model.add_adapter(QSTConfig(r=4, downsample_rank=4))
        else:
            model = side_tuned(model=model)
        run = plain_trainer(model, tmp_path, max_steps=2, neftune_noise_alpha=alpha)
        run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert all(abs(plain - noisy) > 1e-3 for plain, noisy in zip(*losses, strict=True))


def test_the_rest_of_the_base_stays_in_evaluation_mode():
    model = side_tuned("gpt2").train()
    base = model.get_base_model().transformer.base_layer
    assert [name for name, module in base.named_modules() if module.training] == ["wte"]


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("gpt2", {}, ["resid_pdrop=0.1", "embd_pdrop=0.1", "attn_pdrop=0.1"]),
        ("opt", {"layerdrop": 0.3}, ["dropout=0.1", "layerdrop=0.3"]),
        ("gpt_neox", {"hidden_dropout": 0.2}, ["hidden_dropout=0.2"]),
        ("llama", {"attention_dropout": 0.5}, ["attention_dropout=0.5"]),
        ("llama", {}, []),
    ],
)
def test_dropout_of_the_base_is_said_to_have_no_effect(name, changes, named, caplog):
    base = tiny(name, **changes)
    with caplog.at_level(logging.WARNING, logger="hf_qst"):
        side_tuned(model=base)
    assert all(setting in caplog.text for setting in named)
    assert ("has no effect" in caplog.text) == bool(named)
    assert "classifier" not in caplog.text
    assert "summary" not in caplog.text


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_CLS"])
def test_disabled_adapter_gives_the_bases_loss_within_a_training_step(task_type, chunked):
    base = tiny("llama", classifier=task_type == "SEQ_CLS")
    labels = IDS if task_type == "CAUSAL_LM" else torch.tensor([0, 1])
    expected = base(input_ids=IDS, labels=labels).loss
    model = side_tuned(model=base, task_type=task_type, awake=True, chunked_loss=chunked).train()
    before = model(input_ids=IDS, labels=labels).loss
    before.backward()
    with model.disable_adapter():
        got = model(input_ids=IDS, labels=labels)
    torch.testing.assert_close(got.loss, expected)
    assert got.logits is not None
    after = model(input_ids=IDS, labels=labels).loss
    assert torch.equal(after, before)
    assert after.requires_grad
    assert abs(after - expected) > 1e-2


def test_natively_disabled_adapter_gives_the_bases_loss_in_training_mode():
    model = tiny("llama")
    expected = model(input_ids=IDS, labels=IDS).loss
    model.add_adapter(QSTConfig(r=4))
    wake(model).train()
    model.disable_adapters()
    torch.testing.assert_close(model(input_ids=IDS, labels=IDS).loss, expected)


def test_frozen_reference_adapter_gives_its_loss_within_a_training_step():
    model = side_tuned("llama", awake=True)
    model.add_adapter("reference", side_config())
    side_network(model, "reference").load_state_dict(side_network(model).state_dict())
    expected = model.eval()(input_ids=IDS, labels=IDS).loss
    model.train().base_model.set_adapter("reference", inference_mode=True)
    loss = model(input_ids=IDS, labels=IDS).loss
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected)
