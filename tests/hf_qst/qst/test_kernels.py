"""A side network through the Triton kernels, in the interpreter, and what chooses them."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from hf_qst_kernels import dispatch
from tests.architectures import side_network, side_tuned, tiny, token_batch
from tests.hf_qst.qst.side_network_interpreted import CASES, LAYERS, difference, loss_and_gradients, model_of
from tests.interpreter import interpreted

NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.fixture(scope="module")
def found():
    return interpreted("tests/hf_qst/qst/side_network_interpreted.py")


@NEEDS_TRITON
@pytest.mark.parametrize("name", [*CASES, "backward by another rule", "evaluation"])
def test_loss_and_gradients_are_those_of_torch(found, name):
    result, gradients = found[name]["difference"]
    # under autocast a float32 sum in another order may round to the next bfloat16, and what follows sees it
    assert result <= (1e-3 if "autocast" in name else 1e-5)
    assert gradients <= (3e-2 if "autocast" in name else 1e-5)


@NEEDS_TRITON
@pytest.mark.parametrize("name", [*CASES, "evaluation"])
def test_one_kernel_before_each_side_block(found, name):
    """In forward and in backward; where the block is recomputed, forward runs twice; with dropout, torch does it."""
    forward, backward = found[name]["calls"]
    if "dropout" in name:
        assert (forward, backward) == (0, 0)
    else:
        assert forward == (2 * LAYERS if "checkpointing" in name else LAYERS)
        assert backward == (0 if name == "evaluation" else LAYERS)


def decided(monkeypatch, answer):
    """Has `norm_gate` answered so and notes what was asked; without sizes it is asked whether a kernel can run at all."""
    asked, rule = [], dispatch.runs_triton

    def runs_triton(op, tensor, sizes=None):
        if op != "norm_gate":
            return rule(op, tensor, sizes)
        if sizes is None:
            return True
        asked.append(sizes)
        return answer

    monkeypatch.setattr(dispatch, "runs_triton", runs_triton)
    return asked


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_principal_tap_is_centring_and_projection(dtype, autocast):
    part = side_network(side_tuned(downsample="principal")).downsample[1]
    part.mean.normal_()
    hidden = torch.randn(2, 6, 64).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        tapped = part.tap(hidden)
        expected = torch.nn.functional.linear(hidden.float() - part.mean, part.directions)
    assert not tapped.requires_grad and torch.equal(tapped, expected) and tapped.dtype == expected.dtype


def test_by_default_the_cpu_runs_no_op_of_ours_before_a_block(monkeypatch):
    ids, model = token_batch(2, 6), side_tuned(model=tiny("llama", num_hidden_layers=LAYERS), awake=True).train()
    expected = model(input_ids=ids, labels=ids).loss
    monkeypatch.setattr("hf_qst_kernels.norm_gate", None, raising=False)
    assert torch.equal(model(input_ids=ids, labels=ids).loss, expected)


def test_the_table_is_asked_with_the_sizes_it_is_tuned_with(monkeypatch):
    asked = decided(monkeypatch, False)
    model = side_tuned(model=tiny("llama", num_hidden_layers=LAYERS), awake=True)
    model(input_ids=token_batch(3, 6))
    assert asked == [{"rows": 18, "width": 16, "alignment": 16}] * LAYERS


@pytest.mark.parametrize(
    ("dropout", "training", "questions"), [(0.0, True, LAYERS), (0.1, False, LAYERS), (0.1, True, 0)]
)
def test_dropout_that_does_something_keeps_torch(monkeypatch, dropout, training, questions):
    asked = decided(monkeypatch, False)
    model = side_tuned(model=tiny("llama", num_hidden_layers=LAYERS), downsample_dropout=dropout).train(training)
    model(input_ids=token_batch(2, 6))
    assert len(asked) == questions


@pytest.mark.parametrize("checkpointing", [False, "mlp", True])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_the_ops_library_path_is_what_runs_without_it(monkeypatch, autocast, checkpointing):
    ids, losses, gradients = token_batch(2, 6), [], []
    base = tiny("llama", num_hidden_layers=LAYERS)
    model = side_tuned(model=base, side_checkpointing=checkpointing, gate_shape="vector", awake=True).train()
    for answer in (False, True):
        with monkeypatch.context() as patch, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            decided(patch, answer)
            loss = model(input_ids=ids, labels=ids).loss
            losses.append(loss.detach())
            trained = [p for p in side_network(model).parameters() if p.requires_grad]
            gradients.append(torch.autograd.grad(loss, trained))
    assert torch.equal(*losses)
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).abs().max() <= (3e-2 if autocast else 1e-5) * theirs.abs().max()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [name for name in CASES if "autocast" not in name])
def test_on_cuda_as_torch(name):
    model = model_of(CASES[name]).cuda()
    ours, theirs = (loss_and_gradients(model, backend) for backend in ("triton", "torch"))
    assert max(difference(ours, theirs)) <= 1e-4


def test_without_a_gpu_the_op_is_not_even_registered():
    """Registering its operators takes some 20 ms."""
    code = (
        "import sys, torch; from tests.architectures import tiny, token_batch\n"
        "from hf_qst import QSTConfig; from peft import get_peft_model\n"
        "model = get_peft_model(tiny('llama'), QSTConfig(task_type='CAUSAL_LM'))\n"
        "model(input_ids=token_batch(1, 3)); assert 'hf_qst_kernels.ops.tap_linear' in sys.modules\n"
        "assert 'hf_qst_kernels.ops.norm_gate' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
