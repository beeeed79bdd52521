"""The chunked loss is the model's own, or steps aside, whatever a model does between hidden states and loss."""

import types

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM, GraniteConfig, GraniteForCausalLM, LlamaForCausalLM

from hf_qst.base_model.decoder_stack import ARCHITECTURES
from tests.architectures import CONFIGS, VOCAB, side_tuned, tiny, token_batch
from tests.hf_qst.qst.test_loss import loss_and_gradients, ragged
from tests.trainers import plain_trainer

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def shifted(labels, ignore_index=-100):
    return torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[:, 1:].contiguous()


def cross_entropy(logits, labels, ignore_index=-100, **settings):
    labels = shifted(labels, ignore_index).flatten()
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).double(), labels, ignore_index=ignore_index, **settings
    )


CALLS = {
    "labels": lambda inputs: inputs,
    "num_items_in_batch": lambda inputs: {**inputs, "num_items_in_batch": torch.tensor(9)},
    "shift_labels": lambda inputs: {**inputs, "shift_labels": shifted(inputs["labels"])},
    "ignore_index": lambda inputs: {**inputs, "ignore_index": 5},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_architecture_has_its_own_loss(name, call):
    """Against the loss of the model's evaluation mode, which is the model's own code."""
    base = tiny(name, attn_pdrop=0.0) if name == "gpt2" else tiny(name)
    model = side_tuned(model=base, awake=True)
    inputs = ragged()
    inputs["labels"] = inputs["labels"].clamp_min(5) if call == "ignore_index" else inputs["labels"]
    inputs = CALLS[call](inputs)
    with torch.no_grad():
        expected = model.eval()(**inputs)
    got = model.train()(**inputs)
    assert got.logits is None
    torch.testing.assert_close(got.loss, expected.loss, atol=1e-5, rtol=1e-5)
    reduction = "sum" if call == "num_items_in_batch" else "mean"
    own = cross_entropy(expected.logits, inputs["labels"], inputs.get("ignore_index", -100), reduction=reduction)
    torch.testing.assert_close(got.loss.double(), own / (9 if reduction == "sum" else 1), atol=1e-4, rtol=1e-4)


def granite():
    return GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=8.0))


def granite_close_to_one():
    return GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=1.05))


def cohere():
    return CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.0625))


@pytest.mark.parametrize("make", [granite, granite_close_to_one, cohere])
def test_scaled_logits_of_an_architecture_added_later(make, monkeypatch, caplog):
    """Only a row is added, as CONTRIBUTING.md says."""
    torch.manual_seed(0)
    base = make().eval()
    torch.nn.init.normal_(base.get_output_embeddings().weight, std=0.5)
    monkeypatch.setitem(ARCHITECTURES, base.config.model_type, ARCHITECTURES["llama"])
    model = side_tuned(model=base, awake=True)
    inputs = ragged()
    output, gradients = loss_and_gradients(model, **inputs)
    loss_and_gradients(model, **inputs)
    with torch.no_grad():
        logits = model.eval()(input_ids=inputs["input_ids"]).logits
    torch.testing.assert_close(output.loss.double(), cross_entropy(logits, inputs["labels"]), atol=1e-5, rtol=1e-5)
    assert output.logits is not None
    assert any(gradient.any() for gradient in gradients.values())
    assert caplog.text.count("the loss is computed from full logits") == 1


def test_unit_scale_keeps_the_chunked_loss(monkeypatch):
    """A control for the test above."""
    torch.manual_seed(0)
    base = GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=1.0))
    monkeypatch.setitem(ARCHITECTURES, "granite", ARCHITECTURES["llama"])
    assert loss_and_gradients(side_tuned(model=base), **ragged())[0].logits is None


@pytest.mark.parametrize("cap", [30.0, 50.0])
def test_cap_that_nobody_told_us_of(cap):
    """Gemma's caps under another name: ours would be the loss of uncapped logits."""
    base = tiny("llama")
    head = type(base.lm_head).forward
    base.lm_head.forward = types.MethodType(lambda self, x: cap * torch.tanh(head(self, x) / cap), base.lm_head)
    model = side_tuned(model=base, awake=True).train()
    inputs = ragged()
    assert model(**inputs).logits is not None


class WithPenalty(LlamaForCausalLM):
    """A user's model with a loss of its own."""

    def forward(self, *args, labels=None, **kwargs):
        output = super().forward(*args, labels=labels, **kwargs)
        if labels is not None:
            output.loss = output.loss + 1e-2 * output.logits.logsumexp(-1).square().mean()
        return output


def test_subclass_with_a_loss_of_its_own():
    model = side_tuned(model=WithPenalty(tiny("llama").config), awake=True)
    inputs = ragged()
    with torch.no_grad():
        expected = model.eval()(**inputs)
    got = model.train()(**inputs)
    torch.testing.assert_close(got.loss, expected.loss)
    assert abs(got.loss.double() - cross_entropy(expected.logits, inputs["labels"])) > 1e-2


@pytest.mark.parametrize("changes", [False, True])
def test_forward_patched_on_the_instance(changes):
    """After the first step, as a library that patches models may; one that changes nothing keeps the chunked loss."""
    base = tiny("llama")
    model = side_tuned(model=base, awake=True)
    inputs = ragged()
    before, _ = loss_and_gradients(model, **inputs)
    own = type(base).forward

    def forward(self, *args, **kwargs):
        output = own(self, *args, **kwargs)
        if changes and output.loss is not None:
            output.loss = 2 * output.loss
        return output

    base.forward = types.MethodType(forward, base)
    after, _ = loss_and_gradients(model, **inputs)
    assert (after.logits is None) is not changes
    torch.testing.assert_close(after.loss, (2 if changes else 1) * before.loss)


def test_replaced_loss_function():
    base = tiny("llama")
    base.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.square().mean()
    model = side_tuned(model=base, awake=True)
    inputs = ragged()
    with torch.no_grad():
        expected = model.eval()(**inputs).loss
    torch.testing.assert_close(model.train()(**inputs).loss, expected)


def test_label_smoothing_of_the_trainer(tmp_path):
    model = side_tuned("llama", awake=True)
    run = plain_trainer(model, tmp_path, max_steps=1, label_smoothing_factor=0.2)
    inputs = ragged()
    with torch.no_grad():
        logits = model.eval()(input_ids=inputs["input_ids"]).logits
    got = run.compute_loss(model.train(), dict(inputs))
    torch.testing.assert_close(got.double(), cross_entropy(logits, inputs["labels"], label_smoothing=0.2))


def test_trial_leaves_random_numbers_and_gradients_alone():
    model = side_tuned("llama", awake=True).train()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    model(input_ids=token_batch(), labels=token_batch())
    assert torch.equal(torch.rand(4), expected)
    assert all(p.grad is None for p in model.parameters())
