"""Training and running: Trainer and its checkpoints, dtypes, devices, checkpointing, inference mode, torch.compile."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from tests.conformance.methods import IDS, logits, small
from tests.trainers import plain_trainer

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def loss_and_gradients(model, seed: int = 0):
    """Loss of one step in training mode, and gradients by name."""
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model.train()(input_ids=IDS, labels=IDS).loss
    loss.backward()
    named = getattr(model, "_orig_mod", model).named_parameters()
    return loss.detach(), {name: p.grad.clone() for name, p in named if p.grad is not None}


def assert_same_step(left, right, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(left[0], right[0], atol=tolerance, rtol=tolerance)
    assert left[1].keys() == right[1].keys() and left[1]
    for name, gradient in left[1].items():
        torch.testing.assert_close(
            gradient, right[1][name], atol=tolerance, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_resumed_training_gives_the_weights_of_an_uninterrupted_run(line, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    model = line.model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    plain_trainer(model, tmp_path, **settings).train()
    own = line.own(model)
    assert any(not torch.equal(p, before[name]) for name, p in own.items())
    for name, parameter in model.named_parameters():
        assert name in own or torch.equal(parameter, before[name])
    again = line.model()
    plain_trainer(again, tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, parameter in line.own(again).items():
        torch.testing.assert_close(parameter, own[name], atol=1e-5, rtol=1e-4)
    loaded = PeftModel.from_pretrained(small(), tmp_path / "checkpoint-4")
    assert torch.equal(logits(loaded), logits(model))


def test_a_loaded_adapter_trains_on_and_resumes(line, tmp_path):
    """Its configuration knows the weights it was loaded with, which are not those of the checkpoint."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    line.model().save_pretrained(tmp_path / "first")
    runs = []
    for resume in (None, str(tmp_path / "run" / "checkpoint-2")):
        model = PeftModel.from_pretrained(small(), tmp_path / "first", is_trainable=True)
        plain_trainer(model, tmp_path / "run", **settings).train(resume_from_checkpoint=resume)
        runs.append(line.own(model))
    for name, parameter in runs[0].items():
        torch.testing.assert_close(runs[1][name], parameter, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(line, use_reentrant):
    expected = loss_and_gradients(line.random())
    model = line.random()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    got = loss_and_gradients(model)
    assert_same_step((got[0], {name: got[1][name] for name in expected[1]}), expected)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_adapters_have_the_dtype_that_peft_promises(line, dtype, autocast, tmp_path):
    """float32, or that of the base where the caller says so, in training too."""
    expected = torch.float32 if autocast and not line.dtype_of_base else dtype
    torch.manual_seed(5)
    kind = {"autocast_adapter_dtype": autocast}
    model = get_peft_model(small(dtype=dtype), line.config(init_weights=False), **kind)
    if "second" not in line.refuses:
        model.add_adapter("second", line.config(init_weights=False), **kind)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(small(dtype=dtype), tmp_path, is_trainable=True, **kind)
    assert logits(model).dtype == dtype and torch.equal(logits(loaded), logits(model))
    for one in (model, loaded):
        for mode in (False, True):
            one.train(mode)
            assert {p.dtype for p in line.own(one).values()} == {expected}
        loss, gradients = loss_and_gradients(one)
        assert torch.isfinite(loss) and all(gradient.isfinite().all() for gradient in gradients.values())


def test_an_adapter_runs_on_a_base_in_half_precision(line, tmp_path):
    """Mantissas of 8 bits in two layers."""
    model = line.random()
    model.save_pretrained(tmp_path)
    expected = logits(model)
    got = logits(PeftModel.from_pretrained(small(dtype=torch.bfloat16), tmp_path))
    assert got.dtype == torch.bfloat16
    assert (got - expected).norm() < 0.05 * expected.norm()


def test_autocast_runs_and_trains(line):
    model = line.random()
    expected = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        got = logits(model)
    # Another context: torch 2.9 keeps weights that were cast without gradients until the end of one.
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = loss_and_gradients(model)
    assert (got - expected).norm() < 0.05 * expected.norm()
    assert torch.isfinite(loss) and all(gradient.isfinite().all() for gradient in gradients.values())
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())


def test_inference_mode_computes_the_same_and_training_goes_on(line):
    model = line.random()
    expected = logits(model)
    with torch.inference_mode():
        assert torch.equal(model(input_ids=IDS, use_cache=False).logits, expected)
    step = loss_and_gradients(model)
    assert_same_step(step, loss_and_gradients(line.random()))


@pytest.mark.parametrize("training", [True, False])
def test_a_new_adapter_has_the_mode_of_its_base(line, training):
    model = line.model(small().train(training))
    if "second" not in line.refuses:
        model.add_adapter("second", line.config())
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    networks = [net for layer in layers for net in layer.networks.values()]
    assert networks and all(net.training == training for net in networks)


def test_compiled_model_computes_the_same(line):
    model = line.random()
    expected, step = logits(model), loss_and_gradients(model)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), expected, atol=1e-5, rtol=1e-5)
    assert_same_step(loss_and_gradients(compiled), step)


def test_a_failed_forward_leaves_nothing_behind(line):
    model = line.random()
    expected = logits(model)
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[500]]))
    assert torch.equal(logits(model), expected)


def test_a_model_moves_to_meta_and_casts_with_its_adapter(line):
    model = line.random()
    empty = copy.deepcopy(model).to("meta")
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert torch.equal(logits(copy.deepcopy(model).to("cpu")), logits(model))
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert torch.isfinite(logits(half)).all()


@pytest.mark.gpu
@NEEDS_CUDA
def test_a_model_moves_to_the_gpu_and_back(line):
    model = line.random()
    expected = logits(model)
    model.to("cuda")
    with torch.no_grad():
        got = model.eval()(input_ids=IDS.cuda(), use_cache=False).logits
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    torch.testing.assert_close(got.cpu(), expected, atol=2e-3, rtol=2e-3)
    model.train()(input_ids=IDS.cuda(), labels=IDS.cuda()).loss.backward()
    assert torch.equal(logits(model.cpu()), expected)


@pytest.mark.gpu
@NEEDS_CUDA
def test_an_adapter_loads_onto_a_base_on_the_gpu(line, tmp_path):
    model = line.random()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(small().cuda(), tmp_path)
    assert {p.device.type for p in loaded.parameters()} == {"cuda"}
    with torch.no_grad():
        got = loaded.eval()(input_ids=IDS.cuda(), use_cache=False).logits
    torch.testing.assert_close(got.cpu(), logits(model), atol=2e-3, rtol=2e-3)
