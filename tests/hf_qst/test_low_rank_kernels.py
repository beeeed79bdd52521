"""`LowRankLinear` with its kernel against the same layer without: in Triton's interpreter, and on a GPU where one is."""

import importlib.util

import pytest
import torch

import hf_qst_kernels
from hf_qst import LowRankLinear
from hf_qst_kernels import use_backend
from tests.interpreter import interpreted

KERNEL = ["bias", "no bias", "odd sizes", "one row", "frozen factors", "without gradients", "LoRA merged"]
LAYERS = ["rank above the kernel's", "no rows", "autocast", "forward hook", "forward pre-hook", "backward hook"]
LAYERS += ["LoRA on 0.down", "LoRA on 0.up"]
TRANSFORMS = ["vmap", "jvp", "forward mode", "gradients of each row", "make_fx", "jit.trace"]
TRANSFORMS += ["vmap of the op", "forward mode of the op", "make_fx of the op", "jit.trace of the op"]


def layer_of(inputs, rank, outputs, **settings):
    factors = torch.randn(inputs, rank) / inputs**0.5, torch.randn(rank, outputs) / rank**0.5
    return LowRankLinear.from_factors(*factors, torch.randn(outputs), **settings)


@pytest.fixture(scope="module")
def results():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    return interpreted("tests/hf_qst/low_rank_interpreted.py")


@pytest.mark.parametrize("case", KERNEL)
def test_kernel_gives_what_the_two_layers_give(results, case):
    """Outputs and all gradients."""
    error, launches = results[case]
    assert error < 1e-5 and launches == 1


def test_factors_of_another_dtype_than_the_inputs(results):
    error, launches = results["float32 inputs of bfloat16 factors"]
    assert error < 4 * 2**-7 and launches == 1


@pytest.mark.parametrize("case", [*LAYERS, *TRANSFORMS])
def test_where_the_layers_are_called_as_ever(results, case):
    assert results[case] == [0.0, 0]


def test_cpu_runs_no_kernel_and_gives_the_same_bits(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("an op ran")

    monkeypatch.setattr(hf_qst_kernels, "low_rank_linear", never, raising=False)
    layer, x = layer_of(24, 8, 16), torch.randn(3, 24)
    assert torch.equal(layer(x), layer.up(layer.down(x)))


def test_rule_of_dispatch_is_asked():
    with use_backend("triton"), pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        layer_of(24, 8, 16)(torch.randn(3, 24))


def test_compiles_into_one_graph():
    layer, x = layer_of(24, 8, 16), torch.randn(3, 24)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [1, 300])
def test_on_cuda(rows):
    layer = layer_of(512, 16, 384, dtype=torch.bfloat16).cuda().requires_grad_()
    x = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    found = {}
    for backend in ("torch", "triton"):
        with use_backend(backend):
            y = layer(x)
            found[backend] = [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])]
    for ours, twin in zip(found["triton"], found["torch"], strict=True):
        assert (ours - twin).abs().max() <= 8 * 2**-7 * twin.abs().max()
