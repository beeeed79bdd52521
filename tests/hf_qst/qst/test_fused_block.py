"""Side blocks as single autograd nodes beside the same blocks as modules."""

import itertools
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_qst.base_model.decoder_stack import BlockSpec
from hf_qst.qst import fused_block
from hf_qst.qst.side_block import BlockContext, SideBlock

CONFIG = SimpleNamespace(_attn_implementation="sdpa")
SHAPE = (2, 7, 64)


def make(dtype=torch.float64, **changes) -> SideBlock:
    """A block with four heads of 16 channels, two of them for keys, and weights that saturate nothing."""
    spec = {
        "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16,
        "norm": "rms", "norm_eps": 1e-5, "activation": "silu", "gated_mlp": True, "rotary_dim": 16,
    }  # fmt: skip
    torch.manual_seed(0)
    block = SideBlock(BlockSpec(**{**spec, **changes}), CONFIG)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2)
    return block.to(dtype)


def context(rotary_dim: int, dtype: torch.dtype, device="cpu") -> BlockContext:
    """Rotary tables whose halves agree, as those of every supported base."""
    if not rotary_dim:
        return BlockContext()
    angles = torch.linspace(-3, 3, SHAPE[0] * SHAPE[1] * rotary_dim // 2).view(*SHAPE[:2], -1).repeat(1, 1, 2)
    return BlockContext(position_embeddings=(angles.cos().to(device, dtype), angles.sin().to(device, dtype)))


def results(block, fused: bool, monkeypatch, recompute=False, autocast=False) -> list[torch.Tensor]:
    """Output, the gradient in the input, and those of the parameters."""
    dtype = next(block.parameters()).dtype
    device = next(block.parameters()).device
    block.zero_grad()
    torch.manual_seed(1)
    x = torch.randn(SHAPE, dtype=torch.float64).to(device, dtype).requires_grad_()
    weight = torch.randn(SHAPE, dtype=torch.float64).to(device, dtype)
    if fused:
        assert fused_block.fuses(block, x)
    with monkeypatch.context() as patch:
        if not fused:
            patch.setattr(fused_block, "fuses", lambda *_: False)
        given = context(block.attention.spec.rotary_dim, dtype, device)
        with torch.autocast(device.type, dtype=torch.bfloat16) if autocast else nullcontext():
            y = block(x, given, recompute_mlp=recompute)
        (y * weight).sum().backward()
    return [t.cpu() for t in (y.detach(), x.grad, *(parameter.grad for parameter in block.parameters()))]


LAYOUTS = [
    {"norm": norm, "gated_mlp": gated, "qkv_bias": bias, "out_bias": bias, "mlp_bias": bias, "activation": activation,
     "rotary_dim": rotary, "qk_norm": qk_norm}
    for (norm, bias), (gated, activation), (rotary, qk_norm) in itertools.product(
        [("rms", False), ("rms", True), ("layer", True)],
        [(True, "silu"), (True, "gelu_pytorch_tanh"), (False, "gelu"), (False, "relu")],
        [(0, False), (8, False), (16, False), (16, True)],
    )
]  # fmt: skip


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_same_output_and_gradients_as_the_modules(layout, recompute, monkeypatch):
    block = make(**layout)
    fused, modules = (results(block, fused, monkeypatch, recompute) for fused in (True, False))
    for ours, theirs in zip(fused, modules, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_under_autocast_it_is_as_near_the_exact_result_as_the_modules(gated, bias, recompute, monkeypatch):
    """The weights then go through packed copies; rounding differs, its size must not."""
    layout = {"gated_mlp": gated, "qkv_bias": bias, "out_bias": bias, "mlp_bias": bias}
    exact = results(make(**layout), False, monkeypatch)
    block = make(torch.float32, **layout)
    fused, modules = (results(block, way, monkeypatch, recompute, autocast=True) for way in (True, False))
    assert [t.dtype for t in fused] == [t.dtype for t in modules]
    total = sum(t.norm() for t in exact).item()
    for e, ours, theirs in zip(exact, fused, modules, strict=True):
        # a bias before the softmax has a gradient of zero: measured beside all of them
        assert (ours - e).norm() <= 1.5 * (theirs - e).norm() + 1e-4 * total


def test_keeps_less_for_backward_than_the_modules(monkeypatch):
    def kept(fused: bool, recompute: bool) -> int:
        block = make(torch.float32)
        own = {t.untyped_storage().data_ptr() for t in block.parameters()}
        x, sizes = torch.randn(4, 128, 64, requires_grad=True), {}
        angles = torch.randn(4, 128, 16)
        given = BlockContext(position_embeddings=(angles.cos(), angles.sin()))

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with monkeypatch.context() as patch, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            if not fused:
                patch.setattr(fused_block, "fuses", lambda *_: False)
            y = block(x, given, recompute_mlp=recompute)
        del y
        return sum(sizes.values())

    assert kept(True, True) < 0.8 * kept(False, True)
    assert kept(True, False) < 0.8 * kept(False, False)


def test_the_modules_run_where_something_has_to_see_them():
    block, x = make(torch.float32), torch.randn(SHAPE)
    assert fused_block.fuses(block, x)
    seen = []
    handle = block.mlp.down_proj.register_forward_hook(lambda *_: seen.append("down_proj"))
    block(x, context(16, torch.float32))
    assert seen == ["down_proj"] and not fused_block.fuses(block, x)
    handle.remove()
    assert fused_block.fuses(block, x)
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert not fused_block.fuses(block, x)
    assert not fused_block.fuses(block, x.double())
    block.attention.q_proj.forward = block.attention.q_proj.forward  # as accelerate's hooks do
    assert not fused_block.fuses(block, x)
    for layout in ({"parallel": "one_norm"}, {"post_norms": True}, {"activation": "tanh"}):
        assert not fused_block.fuses(make(torch.float32, **layout), x)


def test_frozen_parameters_and_inputs_without_a_gradient():
    block, x = make(), torch.randn(SHAPE, dtype=torch.float64)
    block.requires_grad_(False)
    block.mlp.up_proj.requires_grad_(True)
    y = block(x, context(16, torch.float64))
    y.sum().backward()
    assert block.mlp.up_proj.weight.grad is not None and block.mlp.down_proj.weight.grad is None
    block.requires_grad_(False)
    assert not block(x, context(16, torch.float64)).requires_grad


def test_one_step_of_a_copy_moves_only_the_copy():
    """Nothing of the weights is kept from one forward to the next."""
    block, x = make(torch.float32), torch.randn(SHAPE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = block(x, context(16, torch.float32))
        for parameter in block.parameters():
            parameter.data.mul_(2)
        after = block(x, context(16, torch.float32))
    assert not torch.equal(before, after)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_on_cuda_as_near_the_exact_result_as_the_modules(norm, autocast, monkeypatch):
    exact = results(make(norm=norm), False, monkeypatch)
    block = make(torch.float32, norm=norm).cuda()
    fused, modules = (results(block, way, monkeypatch, True, autocast) for way in (True, False))
    total = sum(t.norm() for t in exact).item()
    for e, ours, theirs in zip(exact, fused, modules, strict=True):
        assert (ours - e).norm() <= 1.5 * (theirs - e).norm() + 1e-5 * total
