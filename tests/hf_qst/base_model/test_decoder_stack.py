"""The table of architectures: every row finds its parts, and anything else is refused by name."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaModel,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_qst import QSTConfig
from hf_qst.base_model.decoder_stack import ARCHITECTURES, find_decoder_stack
from hf_qst.errors import UnsupportedArchitectureError
from tests.architectures import CONFIGS, side_tuned, tiny
from tests.tiny_decoders import tiny_config


def test_every_row_has_a_tiny_model():
    assert set(CONFIGS) <= set(ARCHITECTURES)
    assert all(tiny_config(name).num_hidden_layers == 4 for name in ARCHITECTURES)


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("classifier", [False, True])
def test_parts_are_found(name, classifier):
    model = tiny(name, classifier=classifier)
    stack = find_decoder_stack(model)
    assert stack.module is model.base_model or stack.module is model.base_model.decoder
    assert len(stack.blocks) == 3
    assert isinstance(stack.embeddings, nn.Embedding)
    assert stack.embeddings is model.get_input_embeddings()
    assert "norm" in type(stack.final_norm).__name__.lower()
    block = stack.blocks[0]
    assert isinstance(getattr(block, stack.architecture.attention), nn.Module)
    assert all(isinstance(getattr(block, part), nn.Module) for part in stack.architecture.mlp)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_spec_agrees_with_the_weights(name):
    """Widths, biases and norms are read off the block's own parameters."""
    stack = find_decoder_stack(tiny(name))
    spec, block = stack.spec, stack.blocks[0]
    shapes = {n: tuple(p.shape) for n, p in block.named_parameters()}
    total = sum(p.numel() for p in block.parameters())
    d, f, q, kv = (
        spec.hidden_size,
        spec.intermediate_size,
        spec.num_heads * spec.head_dim,
        spec.num_kv_heads * spec.head_dim,
    )
    matrices = 2 * d * q + 2 * d * kv + (3 if spec.gated_mlp else 2) * d * f
    assert sum(torch.Size(s).numel() for s in shapes.values() if len(s) == 2) == matrices
    biases = spec.qkv_bias * (q + 2 * kv) + spec.out_bias * d + spec.mlp_bias * (f + d + f * spec.gated_mlp)
    norms = (1 if spec.parallel == "one_norm" else 2) + 2 * spec.post_norms
    each = 2 if spec.norm == "layer" else 1
    assert total - matrices == biases + each * (norms * d + spec.qk_norm * 2 * spec.head_dim)


def test_wrapped_stack_is_found_again():
    model = side_tuned("llama")
    stack = find_decoder_stack(model.get_base_model())
    assert isinstance(stack.module, LlamaModel)
    assert stack.path == "model"


STRANGERS = {
    "encoder_decoder": (
        lambda: T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1)),
        "encoder-decoder",
    ),
    "encoder": (
        lambda: BertForMaskedLM(
            BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        ),
        "'bert'",
    ),
    "recurrence": (
        lambda: MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1)),
        "'mamba' (its blocks have no attention",
    ),
    "bare_stack": (lambda: tiny("llama").model, "bare decoder stack"),
    "bare_opt_stack": (lambda: tiny("opt").model, "bare decoder stack"),
    "no_blocks": (lambda: tiny("llama", num_hidden_layers=0), "no decoder blocks"),
    "no_config": (lambda: nn.Sequential(nn.Linear(2, 2)), "no transformers config"),
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_unsupported_model_is_named_with_the_supported_ones(kind):
    make, reason = STRANGERS[kind]
    model = make()
    with pytest.raises(UnsupportedArchitectureError) as error:
        find_decoder_stack(model)
    message = str(error.value)
    assert type(model).__name__ in message
    assert reason in message
    assert "hf_qst.supported_models()" in message


@pytest.mark.parametrize("kind", ["encoder_decoder", "encoder", "recurrence", "bare_stack", "no_blocks"])
def test_unsupported_model_is_refused_by_get_peft_model(kind):
    model = STRANGERS[kind][0]()
    with pytest.raises(UnsupportedArchitectureError):
        get_peft_model(model, QSTConfig())
