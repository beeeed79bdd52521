"""The training loss from the frozen head in chunks equals the one from full logits, and never holds them."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_qst.qst import frozen_head
from tests.architectures import CONFIGS, NF4, VOCAB, side_network, side_tuned, tiny, token_batch


def ragged(rows=3, length=12):
    ids = token_batch(rows, length)
    labels = ids.clone()
    labels[0, :7] = -100
    labels[1, 3:5] = -100
    return {"input_ids": ids, "labels": labels}


def loss_and_gradients(model, **inputs):
    model.zero_grad()
    output = model.train()(**inputs)
    output.loss.backward()
    return output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_loss(model, inputs, atol=1e-5):
    chunked, chunked_grads = loss_and_gradients(model, **inputs)
    plain, plain_grads = loss_and_gradients(model, **inputs, logits_to_keep=0)
    assert chunked.logits is None
    assert plain.logits is not None
    torch.testing.assert_close(chunked.loss, plain.loss, atol=atol, rtol=1e-5)
    assert chunked_grads.keys() == plain_grads.keys()
    for name, gradient in chunked_grads.items():
        torch.testing.assert_close(gradient, plain_grads[name], atol=atol, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    return chunked.loss


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_architecture(name):
    """Gemma 2 caps its logits and Phi's head has a bias."""
    # GPT-2's configuration has attention dropout, which the side blocks follow.
    base = tiny(name, attn_pdrop=0.0) if name == "gpt2" else tiny(name)
    assert_same_loss(side_tuned(model=base, awake=True), ragged())


def test_cap_and_bias_are_not_no_ops():
    assert tiny("gemma2").config.final_logit_softcapping == 30.0
    gemma = tiny("gemma2", final_logit_softcapping=1.0)
    loss = assert_same_loss(side_tuned(model=gemma, awake=True), ragged())
    gemma.config.final_logit_softcapping = None
    assert abs(gemma(**ragged()).loss - loss) > 1e-2
    phi = tiny("phi")
    torch.nn.init.normal_(phi.lm_head.bias)
    assert_same_loss(side_tuned(model=phi, awake=True), ragged())


@pytest.mark.parametrize("count", [7, torch.tensor(7), torch.tensor(7.0)])
def test_num_items_in_batch(count):
    assert_same_loss(side_tuned("llama", awake=True), {**ragged(), "num_items_in_batch": count})


def test_shifted_labels():
    inputs = ragged()
    shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    model = side_tuned("llama", awake=True)
    expected = assert_same_loss(model, inputs)
    assert torch.equal(assert_same_loss(model, {**inputs, "shift_labels": shifted}), expected)


def test_only_ignored_labels():
    inputs = {"input_ids": token_batch(), "labels": torch.full((2, 12), -100), "num_items_in_batch": 4}
    output, gradients = loss_and_gradients(side_tuned("llama", awake=True), **inputs)
    assert output.loss.item() == 0
    assert not any(gradient.any() for gradient in gradients.values())


def test_padded_batch_and_inputs_embeds():
    inputs = ragged()
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :7] = 0
    model = side_tuned("llama", awake=True)
    expected = assert_same_loss(model, {**inputs, "attention_mask": mask})
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    got = assert_same_loss(model, {"inputs_embeds": embeds, "labels": inputs["labels"], "attention_mask": mask})
    torch.testing.assert_close(got, expected)


def test_bfloat16_base():
    assert_same_loss(side_tuned(model=tiny("llama", dtype=torch.bfloat16), awake=True), ragged(), atol=2e-2)


def test_packed_sequences_equal_separate_ones():
    """Positions that start again mark a new sequence, and neither base nor side network looks across."""
    model = side_tuned("llama", awake=True)
    rows = [token_batch(1, n, seed=n) for n in (5, 8, 4)]
    ids = torch.cat(rows, 1)
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    labels = ids.clone()
    labels[0, [0, 5, 13]] = -100
    packed, packed_grads = loss_and_gradients(model, input_ids=ids, position_ids=positions, labels=labels)
    assert packed.logits is None
    model.zero_grad()
    total = sum(model(input_ids=row, labels=row, num_items_in_batch=14).loss for row in rows)
    total.backward()
    torch.testing.assert_close(packed.loss, total, atol=1e-5, rtol=1e-5)
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(packed_grads[name], p.grad, atol=1e-5, rtol=1e-4)


def test_logits_are_there_when_they_are_wanted():
    model = side_tuned("llama", awake=True)
    inputs = ragged()
    assert model.train()(**inputs).logits is None
    assert model(**inputs, logits_to_keep=0).logits.shape == (3, 12, VOCAB)
    assert model(input_ids=inputs["input_ids"]).logits.shape == (3, 12, VOCAB)
    with torch.no_grad():
        assert model(**inputs).logits is not None
        assert model.eval()(**inputs).logits is not None
    assert side_tuned("llama", chunked_loss=False).train()(**inputs).logits is not None


def test_evaluation_loss_equals_training_loss():
    model = side_tuned("llama", awake=True)
    inputs = ragged()
    training = model.train()(**inputs).loss
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**inputs).loss, training, atol=1e-5, rtol=1e-5)


def test_trained_head_gets_its_gradient():
    model = side_tuned("llama", modules_to_save=["lm_head"], awake=True)
    output, gradients = loss_and_gradients(model, **ragged())
    assert output.logits is not None
    assert any("lm_head" in name and gradient.any() for name, gradient in gradients.items())


def test_disabled_adapter_computes_the_bases_loss():
    base = tiny("llama")
    inputs = ragged()
    expected = base(**inputs).loss
    model = side_tuned(model=base, awake=True)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model.eval()(**inputs).loss, expected)


def test_tuple_output_has_the_loss_first():
    model = side_tuned("llama", awake=True).train()
    inputs = ragged()
    torch.testing.assert_close(model(**inputs, return_dict=False)[0], model(**inputs).loss)


class Largest(TorchDispatchMode):
    """Remembers the most elements any tensor that an operation returned had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and not any(tensor is a for a in args):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_of_all_logits_exists_in_a_training_step():
    vocab, rows, length = 40_000, 4, 128
    model = side_tuned(model=tiny("llama", vocab_size=vocab), awake=True).train()
    ids = token_batch(rows, length)
    weight = model.get_output_embeddings().weight.numel()
    seen = {}
    for name, extra in (("chunked", {}), ("full", {"logits_to_keep": 0})):
        with Largest() as largest:
            model(input_ids=ids, labels=ids, **extra).loss.backward()
        seen[name] = largest.elements
    logits = rows * length * vocab
    assert seen["full"] >= logits
    # 32 MiB of float32 are what a chunk may hold; the head itself is smaller than all logits here.
    assert seen["chunked"] <= max(weight, 8 * 2**20) < logits / 2


def test_loss_of_the_side_network_is_not_stored_on_the_model():
    model = side_tuned("llama", awake=True)
    loss_and_gradients(model, **ragged())
    layer_state = [v for m in model.modules() for v in vars(m).values() if isinstance(v, torch.Tensor)]
    assert not [t for t in layer_state if t.requires_grad or t.grad_fn is not None]
    assert side_network(model).upsample.weight.grad is not None


def with_4bit_head(directory, name="llama", **settings):
    """A tiny base whose head is in 4 bits like its other layers; transformers leaves heads out unless told."""
    base = tiny(name)
    if getattr(base.lm_head, "bias", None) is not None:
        torch.nn.init.normal_(base.lm_head.bias)
    base.save_pretrained(directory)
    config = BitsAndBytesConfig(**{**NF4, **settings}, llm_int8_skip_modules=["none of them"])
    base = AutoModelForCausalLM.from_pretrained(directory, quantization_config=config, device_map={"": "cpu"})
    assert type(base.lm_head).__name__ == "Linear4bit"
    return base


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("name", ["llama", "phi"])
def test_head_in_nf4(name, double, tmp_path, monkeypatch):
    """Phi's has a bias."""
    seen = []
    ours = frozen_head.hf_qst_kernels.linear_cross_entropy
    monkeypatch.setattr(
        frozen_head.hf_qst_kernels, "linear_cross_entropy", lambda *a, **k: seen.append(a[1]) or ours(*a, **k)
    )
    model = side_tuned(model=with_4bit_head(tmp_path, name, bnb_4bit_use_double_quant=double), awake=True)
    assert_same_loss(model, ragged())
    # the first is the trial of the model's own loss
    assert [(weight.out_features, weight.nested_absmax is not None) for weight in seen] == [(VOCAB, double)] * 2


def test_head_in_nf4_multiplies_in_its_compute_dtype(tmp_path):
    base = with_4bit_head(tmp_path, bnb_4bit_compute_dtype=torch.bfloat16)
    model = side_tuned(model=base, awake=True, readout_rank=0)
    chunked, _ = loss_and_gradients(model, **ragged())
    plain, _ = loss_and_gradients(model, **ragged(), logits_to_keep=0)
    base.lm_head.compute_dtype = torch.float32
    exact, _ = loss_and_gradients(model, **ragged())
    assert chunked.loss.dtype == torch.float32
    # both paths round the same operands, and logits of a few units to steps of 2^-7; their mean over 21 rows is nearer
    assert abs(chunked.loss - plain.loss) < 1e-4 < abs(chunked.loss - exact.loss)


def test_head_in_fp4_keeps_the_models_own_path(tmp_path, caplog):
    model = side_tuned(model=with_4bit_head(tmp_path, bnb_4bit_quant_type="fp4"), awake=True)
    for _ in range(2):
        output, gradients = loss_and_gradients(model, **ragged())
    assert output.logits is not None and any(gradient.any() for gradient in gradients.values())
    assert caplog.text.count("the loss is computed from full logits") == 1


def test_head_in_nf4_trains_on_after_an_evaluation(tmp_path):
    """On some processors bitsandbytes packs a layer that runs in evaluation mode for a kernel without backward."""
    base = with_4bit_head(tmp_path)
    packs = base.lm_head.support_avx512bf16_for_cpu
    model = side_tuned(model=base, awake=True)
    before = assert_same_loss(model, ragged())
    with torch.no_grad():
        model.eval()(**ragged())
    assert torch.equal(assert_same_loss(model, ragged()), before)
    model.unload()
    assert base.lm_head.support_avx512bf16_for_cpu == packs


def test_packed_head_is_refused_before_the_base_runs(tmp_path):
    from tests.hf_qst.base_model.test_packed_weights import pack

    base = with_4bit_head(tmp_path)
    model = side_tuned(model=base, awake=True)
    pack(base.lm_head)
    with pytest.raises(ValueError, match=r"has packed its 4-bit weight .* load the base again and wrap it before"):
        model.train()(**ragged())
    frozen_head.check_head(base.eval())
