"""A fresh side network changes nothing: logits are the base's bit for bit."""

import pytest
import torch
from peft import PeftModel

from hf_qst import QSTConfig
from hf_qst.qst.config import DOWNSAMPLE_KINDS
from tests.architectures import CONFIGS, digest, in_nf4, side_network, side_tuned, tiny, token_batch

NAMES = sorted(CONFIGS)


def padded_batch():
    ids = token_batch(3, 10)
    ids[0, 6:] = 0
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def logits(model, **inputs):
    with torch.no_grad():
        return model(**(inputs or padded_batch()), use_cache=False).logits


def assert_identical_start(base, **settings):
    expected = logits(base)
    model = side_tuned(model=base, **settings)
    assert torch.equal(logits(model.eval()), expected)
    assert torch.equal(logits(model.train()), expected)
    # With labels the logits are only computed when they are asked for, and with gradients everything runs.
    inputs = padded_batch()
    assert torch.equal(model(**inputs, labels=inputs["input_ids"], logits_to_keep=0).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_fresh_adapter_is_the_base(name, dtype):
    assert_identical_start(tiny(name, dtype=dtype))


def test_fresh_adapter_is_the_base_in_half_precision():
    assert_identical_start(tiny("llama", dtype=torch.float16))


@pytest.mark.parametrize("kind", DOWNSAMPLE_KINDS)
@pytest.mark.parametrize("mix", ["residual", "paper"])
def test_every_downsampler_and_exact_mix_starts_at_the_base(kind, mix):
    settings = {"mix_shape": "vector", "gate_shape": "vector"} if mix == "paper" else {}
    assert_identical_start(tiny("llama"), downsample=kind, mix=mix, **settings)


def test_papers_settings_start_at_the_base():
    base = tiny("llama")
    expected = logits(base)
    model = side_tuned(model=base, **vars_of(QSTConfig.paper()))
    assert torch.equal(logits(model), expected)


def test_authors_settings_do_not_start_at_the_base():
    base = tiny("llama")
    expected = logits(base)
    model = side_tuned(model=base, **vars_of(QSTConfig.reference()))
    assert not torch.allclose(logits(model), expected, atol=1e-2)


def vars_of(config):
    names = ("mix", "mix_shape", "gate_shape", "gate_init", "side_heads", "tap_storage")
    return {name: getattr(config, name) for name in names}


def test_fresh_adapter_on_nf4_is_the_base(tmp_path):
    assert_identical_start(in_nf4(tmp_path))


@pytest.mark.parametrize("name", ["opt", "gpt2", "gemma2"])
def test_fresh_adapter_on_nf4_of_another_architecture_is_the_base(name, tmp_path):
    assert_identical_start(in_nf4(tmp_path, name))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen3"])
def test_fresh_classifier_adapter_is_the_base(name):
    base = tiny(name, classifier=True, num_labels=3)
    expected = logits(base)
    model = side_tuned(task_type="SEQ_CLS", model=base)
    assert expected.shape == (3, 3)
    assert torch.equal(logits(model.eval()), expected)
    assert torch.equal(logits(model.train()), expected)


def test_fresh_classifier_adapter_on_nf4_is_the_base(tmp_path):
    base = in_nf4(tmp_path, classifier=True)
    expected = logits(base)
    assert torch.equal(logits(side_tuned(task_type="SEQ_CLS", model=base).eval()), expected)


def test_identity_survives_large_finite_side_states():
    """The side network may be anything finite: a zero last layer and a mix at its start hide it exactly."""
    base = tiny("llama")
    expected = logits(base)
    model = side_tuned(model=base)
    with torch.no_grad():
        for parameter in side_network(model).blocks.parameters():
            parameter.mul_(100)
    assert torch.equal(logits(model), expected)


def test_stays_in_eval_mode_whatever_is_asked():
    base = tiny("opt")
    model = side_tuned(model=base, awake=True).train()
    inside = model.get_base_model().model.decoder.base_layer
    # Noise on the embeddings acts in training mode.
    assert [name for name, module in inside.named_modules() if module.training] == ["embed_tokens"]
    assert all(module.training for module in side_network(model).modules())
    ids = token_batch()
    # OPT drops 10 % of its activations in training mode.
    first, second = (model(input_ids=ids, labels=ids, logits_to_keep=0).logits for _ in range(2))
    assert torch.equal(first, second)
    base.train()
    assert [name for name, module in inside.named_modules() if module.training] == ["embed_tokens"]


@pytest.mark.parametrize("kind", ["float32", "nf4"])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_inference_leaves_the_bytes_of_the_base(name, kind, tmp_path):
    base = in_nf4(tmp_path, name) if kind == "nf4" else tiny(name)
    logits(base)
    before = digest(base)
    model = side_tuned(model=base, awake=True)
    model.generate(input_ids=token_batch(), max_new_tokens=4)
    model.state_dict()
    logits(model)
    assert digest(model.get_base_model()) == before


@pytest.mark.parametrize("mix", ["residual", "paper", "sigmoid"])
@pytest.mark.parametrize("native", [False, True])
def test_random_start_on_request_is_not_the_base(mix, native, tmp_path):
    """`init_weights=False` is PEFT's convention for tests and experiments."""
    base = tiny("llama")
    expected = logits(base)
    if native:
        base.add_adapter(QSTConfig(r=4, mix=mix, init_weights=False))
        model = base.eval()
    else:
        model = side_tuned(model=base, mix=mix, init_weights=False).eval()
    assert (logits(model) - expected).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny("llama"), tmp_path)), logits(model))
