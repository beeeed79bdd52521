"""Parameter counts against the formula of the paper."""

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from hf_qst import QSTConfig
from tests.architectures import CONFIGS, side_network, side_tuned, tiny


def block_parameters(model, d_s, r, heads, kv_heads, head_dim):
    """P_B of the formula: one decoder block of the base's class at width d_s."""
    config = model.config
    if config.model_type == "opt":
        f_s = config.ffn_dim // r
        return 4 * d_s**2 + 4 * d_s + 2 * d_s * f_s + f_s + d_s + 4 * d_s
    f_s = config.intermediate_size // r
    return 2 * d_s * heads * head_dim + 2 * d_s * kv_heads * head_dim + 3 * d_s * f_s + 2 * d_s


def expected(model, r, kind, rank, gate, mix, heads, kv_heads, head_dim):
    d = model.config.hidden_size
    d_s, layers = d // r, model.config.num_hidden_layers
    down = {"linear": d * d_s, "lora": rank * (d + d_s), "adapter": rank * (d + d_s)}.get(kind, 0)
    gate_size, mix_size = (d_s if gate == "vector" else 1), (d if mix == "vector" else 1)
    norm = 2 * d_s if model.config.model_type == "opt" else d_s
    block = block_parameters(model, d_s, r, heads, kv_heads, head_dim)
    return layers * (block + down + 2 * d_s + gate_size) + norm + (d_s * d + d) + mix_size


BASES = {
    # name: the base, and heads, kv heads and head size of its side blocks at r=2 with side_heads="auto"
    "llama": (lambda: tiny("llama", num_key_value_heads=4), (2, 2, 16)),
    "gqa_llama": (lambda: tiny("llama"), (2, 1, 16)),
    "opt": (lambda: tiny("opt"), (2, 2, 16)),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("shape", ["scalar", "vector"])
@pytest.mark.parametrize("kind", ["linear", "lora", "adapter", "maxpool", "avgpool", "principal"])
def test_trainable_parameters_follow_the_formula(base, shape, kind):
    make, heads = BASES[base]
    model = make()
    tuned = side_tuned(
        model=model, r=2, downsample=kind, downsample_rank=8, gate_shape=shape, mix_shape=shape, readout_rank=0
    )
    trainable = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    assert trainable == expected(model, 2, kind, 8, shape, shape, *heads)


@pytest.mark.parametrize("base", BASES)
def test_undivided_heads_follow_the_formula(base):
    model = BASES[base][0]()
    kv_heads = getattr(model.config, "num_key_value_heads", 4)
    tuned = side_tuned(model=model, r=2, downsample_rank=8, side_heads="keep", readout_rank=0)
    trainable = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    assert trainable == expected(model, 2, "adapter", 8, "scalar", "scalar", 4, kv_heads, 8)


def test_fewer_side_blocks_and_the_readout_follow_the_formula():
    """Blocks 1 and 3 of 4 have side blocks; 0 and 3 are read with rank 5."""
    model = tiny("llama", num_hidden_layers=4)
    whole = side_tuned(model=tiny("llama", num_hidden_layers=4), r=2, readout_rank=0)
    few = side_tuned(model=model, r=2, side_every=2, readout_rank=5, readout_every=3)
    count = lambda tuned: sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    network = side_network(whole)
    a_block = sum(
        p.numel() for part in (network.blocks, network.downsample, network.gates) for p in part[0].parameters()
    )
    assert count(few) == count(whole) - 2 * a_block + 2 * 5 * 64 + 2 * 5 * 64
    assert side_network(few).places == [1, 3] and list(side_network(few).readout.down) == ["0", "3"]


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_side_block_has_the_parameters_of_the_bases_block_at_its_width(name):
    """The base's own class, built with every width divided, is the independent count."""
    model = tiny(name)
    tuned = side_tuned(model=model, r=2, side_heads="keep")
    block = side_network(tuned).blocks[0]
    if name == "gpt2":
        small = tiny(name, n_embd=32, hidden_size=32)
        reference = small.transformer.h[0]
    else:
        sizes = {"ffn_dim": 64, "word_embed_proj_dim": 32} if name == "opt" else {"intermediate_size": 64}
        head_dim = getattr(model.config, "head_dim", None)
        if head_dim is not None:
            sizes["head_dim"] = head_dim // 2
        small = tiny(name, hidden_size=32, **sizes)
        stack = {"opt": lambda m: m.model.decoder.layers, "gpt_neox": lambda m: m.gpt_neox.layers}
        reference = stack.get(name, lambda m: m.model.layers)(small)[0]
    assert sum(p.numel() for p in block.parameters()) == sum(p.numel() for p in reference.parameters())


def test_llama_2_7b_has_the_papers_count():
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    with torch.device("meta"):
        model = get_peft_model(LlamaForCausalLM(config), QSTConfig.paper(task_type="CAUSAL_LM"))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 28_610_849


@pytest.mark.parametrize(
    ("kind", "share"),
    [("adapter", 0.00407), ("lora", 0.00407), ("maxpool", 0.00375), ("avgpool", 0.00375), ("linear", 0.00849)],
)
def test_llama_2_7b_shares_are_those_of_the_papers_table(kind, share):
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    with torch.device("meta"):
        model = get_peft_model(LlamaForCausalLM(config), QSTConfig.paper(task_type="CAUSAL_LM", downsample=kind))
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count / (7e9 + count) == pytest.approx(share, abs=5e-6)


def test_every_trainable_parameter_reaches_an_optimizer_after_a_cast():
    model = side_tuned("llama").to(torch.bfloat16).to("cpu")
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("gates.0.value" in n for n in trainable)
    assert any("mix.alpha.value" in n for n in trainable)
    assert all(p.is_leaf for p in model.parameters())
