"""Experts as linear layers of their own: the same function, and the way back."""

import pytest
import torch
from torch import nn

from hf_qst.base_model.experts import SplitExperts, expert_shapes, fused_experts, join, own_memory, put_back, split
from tests.architectures import token_batch
from tests.mixtures import CONFIGS, tiny_mixture


def logits(model):
    with torch.no_grad():
        return model(token_batch(3, 17)).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_split_experts_compute_the_same_bit_for_bit(name):
    model = tiny_mixture(name)
    expected, keys = logits(model), {n: p.shape for n, p in model.state_dict().items()}
    fused = fused_experts(model)
    assert fused
    shapes = {f"{path}.{inner}": shape for path, one in fused.items() for inner, shape in expert_shapes(one).items()}
    taken = split(model, fused)
    layers = {n: m for n, m in model.named_modules() if n in shapes}
    assert {n: (m.in_features, m.out_features) for n, m in layers.items()} == shapes
    assert torch.equal(logits(model), expected)
    own_memory(model)
    assert torch.equal(logits(model), expected)
    join(model, fused)
    assert torch.equal(logits(model), expected) and {n: p.shape for n, p in model.state_dict().items()} == keys
    put_back(model, taken)
    assert all(model.get_submodule(path) is one for path, one in fused.items())


def test_split_layers_share_the_memory_of_the_fused_weights_until_it_is_taken():
    model = tiny_mixture("gpt_oss")
    path, fused = next(iter(fused_experts(model).items()))
    memory = fused.gate_up_proj.untyped_storage().data_ptr()
    split(model, [path])
    layer = model.get_submodule(f"{path}.1.gate_up")
    assert layer.weight.untyped_storage().data_ptr() == memory
    own_memory(model)
    assert layer.weight.untyped_storage().data_ptr() != memory and layer.weight.is_contiguous()


def test_a_token_of_no_expert_gets_nothing():
    """Expert parallelism marks tokens of other devices by an index one above the last."""
    fused = next(iter(fused_experts(tiny_mixture("mixtral")).values()))
    experts, hidden = SplitExperts(fused), torch.randn(5, 64)
    index, weights = torch.tensor([[0, 4], [4, 4], [2, 1], [4, 3], [1, 0]]), torch.rand(5, 2)
    with torch.no_grad():
        ours, theirs = experts(hidden, index, weights), fused(hidden, index, weights)
    assert torch.equal(ours, theirs) and not ours[1].any() and ours[0].any()


def test_an_expert_without_tokens_runs_where_something_listens():
    experts = SplitExperts(next(iter(fused_experts(tiny_mixture("mixtral")).values())))
    seen = []
    handle = experts[3].down.register_forward_hook(lambda module, args, output: seen.append(tuple(args[0].shape)))
    index = torch.zeros(4, 1, dtype=torch.long)
    experts(torch.randn(4, 64), index, torch.ones(4, 1))
    handle.remove()
    experts(torch.randn(4, 64), index, torch.ones(4, 1))
    assert seen == [(0, 96)]


def test_gradients_reach_the_experts_that_ran_and_the_tokens():
    model = tiny_mixture("qwen3_moe")
    expected = model(token_batch(2, 9)).logits.square().mean()
    expected.backward()
    path, fused = next(iter(fused_experts(model).items()))
    wanted = fused.down_proj.grad
    other = tiny_mixture("qwen3_moe")
    split(other, fused_experts(other))
    other(token_batch(2, 9)).logits.square().mean().backward()
    for index, gradient in enumerate(wanted):
        layer = other.get_submodule(f"{path}.{index}.down")
        assert isinstance(layer, nn.Linear)
        found = torch.zeros_like(gradient) if layer.weight.grad is None else layer.weight.grad
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-7)
