"""Settings within an architecture that change its blocks: what the table's specs must follow."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from tests.architectures import side_network, side_tuned, tiny, token_batch, wake

ROPE = {"rope_theta": 10000.0}
VARIANTS = {
    # OPT-350m: norms after the branches and a stack whose output is narrower than its states.
    "opt_350m": lambda: tiny("opt", word_embed_proj_dim=32, do_layer_norm_before=False),
    "opt_without_bias": lambda: tiny("opt", enable_bias=False),
    "neox_sequential": lambda: tiny("gpt_neox", use_parallel_residual=False),
    "neox_without_bias": lambda: tiny("gpt_neox", attention_bias=False),
    "phi_with_qk_norm": lambda: tiny("phi", qk_layernorm=True),
    "phi_with_a_rotated_quarter": lambda: tiny(
        "phi", rope_parameters={**ROPE, "rope_type": "default", "partial_rotary_factor": 0.25}
    ),
    "llama_with_biases": lambda: tiny("llama", attention_bias=True, mlp_bias=True),
    "llama_3_rope": lambda: tiny(
        "llama",
        rope_parameters={
            **ROPE,
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "llama_one_kv_head": lambda: tiny("llama", num_key_value_heads=1),
    "gpt2_wide_mlp": lambda: tiny("gpt2", n_inner=200),
    "tied_head": lambda: tiny("llama", tie_word_embeddings=True),
}


@pytest.fixture(scope="module", params=VARIANTS)
def base(request):
    return VARIANTS[request.param]()


def test_starts_at_the_base_and_decodes_alike_with_a_cache(base):
    ids = token_batch()
    with torch.no_grad():
        expected = base(input_ids=ids).logits
        model = side_tuned(model=base).eval()
        assert torch.equal(model(input_ids=ids).logits, expected)
    wake(model)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "num_beams": 3}
    cached = model.generate(input_ids=ids, **settings)
    assert torch.equal(cached, model.generate(input_ids=ids, use_cache=False, **settings))
    model.unload()


def test_trains_every_side_parameter(base):
    model = side_tuned(model=base, awake=True).train()
    ids = token_batch()
    model(input_ids=ids, labels=ids).loss.backward()
    assert not [
        name
        for name, p in side_network(model).named_parameters()
        # A key bias shifts every score of a query alike, which a softmax ignores.
        if not name.endswith("k_proj.bias") and (p.grad is None or not p.grad.any())
    ]
    model.unload()


@pytest.mark.parametrize("task", ["TOKEN_CLS", "SEQ_CLS"])
def test_classification_heads_train(task):

    auto = {"TOKEN_CLS": AutoModelForTokenClassification, "SEQ_CLS": AutoModelForSequenceClassification}[task]
    ids = token_batch()
    labels = torch.zeros_like(ids) if task == "TOKEN_CLS" else torch.tensor([0, 1])
    model = side_tuned(task_type=task, model=auto.from_config(tiny("llama").config), awake=True).train()
    model(input_ids=ids, labels=labels).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert any("modules_to_save" in name and p.grad.any() for name, p in model.named_parameters() if p.requires_grad)
