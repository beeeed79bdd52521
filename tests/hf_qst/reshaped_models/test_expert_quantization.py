"""Experts in 4 bits, which transformers leaves in floating point."""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_qst import QSTConfig, quantize_experts
from hf_qst.base_model.experts import fused_experts
from hf_qst.base_model.packed_weights import forbid_packing
from hf_qst.base_model.quantized_layers import stored_bytes
from hf_qst.reshaped_models import split_experts
from tests.architectures import tiny, token_batch
from tests.mixtures import CONFIGS, tiny_mixture


def nf4():
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


def logits(model):
    forbid_packing(model)
    with torch.no_grad():
        return model.eval()(token_batch(3, 17, seed=7)).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_experts_take_four_bits_a_weight_and_reload_as_they_are(name, tmp_path):
    dense = tiny_mixture(name)
    weights = sum(
        getattr(m, part).numel() for m in fused_experts(dense).values() for part in ("gate_up_proj", "down_proj")
    )
    dense.save_pretrained(tmp_path / "dense")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=nf4())
    before = stored_bytes(loaded)
    model = quantize_experts(loaded)
    saved = before - stored_bytes(model)
    # 4 bytes a weight before; half a byte, a byte for 64 scales and 4 for 256 of these after, and a table a layer.
    layers = sum(len(m.gate_up_proj) * 2 for m in fused_experts(dense).values())
    assert saved == pytest.approx(weights * (4 - 0.5 - 1 / 64 - 4 / 64 / 256), abs=2048 * layers)
    assert saved > 0.7 * 4 * weights
    expected = logits(model)
    assert torch.nn.functional.cosine_similarity(expected.flatten(), logits(dense).flatten(), dim=0) > 0.6
    model.save_pretrained(tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert stored_bytes(again) == stored_bytes(model) and torch.equal(logits(again), expected)


def test_experts_alone_are_quantised_in_a_model_in_floating_point(tmp_path):
    model = quantize_experts(tiny_mixture("mixtral"))
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.float32
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), expected) and again.lm_head.weight.dtype == torch.float32


def test_a_folder_of_split_experts_loads_in_four_bits(tmp_path):
    """So that the weights in floating point never lie in memory as a whole."""
    model = split_experts(tiny_mixture("gpt_oss"))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected, rtol=1e-5, atol=1e-5)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=nf4())
    layers = [m for n, m in loaded.named_modules() if "experts." in n and n.endswith(("gate_up", "down"))]
    assert layers and all(type(layer).__name__ == "Linear4bit" for layer in layers)
    assert logits(loaded).isfinite().all()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_a_side_network_trains_on_experts_in_four_bits(name):
    model = quantize_experts(tiny_mixture(name))
    expected = logits(model)
    tuned = get_peft_model(model, QSTConfig(task_type="CAUSAL_LM"))
    assert torch.equal(logits(tuned), expected)
    ids = token_batch(3, 17)
    tuned.train()(input_ids=ids, labels=ids).loss.backward()
    trained = [p for p in tuned.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_what_cannot_be_done_is_refused():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no experts"):
        quantize_experts(tiny("llama"))
