"""A loss or gradient that is not finite ends training before the weights change, and the error names the module."""

import pytest
import torch

from hf_qst_plugins.training import NonFiniteCallback
from tests.conformance.methods import IDS, LINES
from tests.toy_data import token_dataset
from tests.trainers import plain_trainer


@pytest.fixture(params=["qst", "qst_tail", "disp", "mixed_rank"])
def line(request):
    return LINES[request.param]


class Spoil:
    """Forward hook: from the second training call on the output, or the gradient through it, is not finite."""

    def __init__(self, what):
        self.what, self.calls = what, 0

    def __call__(self, module, arguments, y):
        self.calls += 1
        if self.calls < 2:
            return y
        return y * torch.inf if self.what == "value" else y + torch.sqrt(y * 0) * 0


def run(line, tmp_path, model, **settings):
    trainer = plain_trainer(model, tmp_path, token_dataset(16), max_steps=4, **settings)
    trainer.add_callback(NonFiniteCallback())
    own = line.own(model)
    seen = []

    class Remember(type(trainer.callback_handler.callbacks[0])):
        def on_step_end(self, *arguments, **named):
            seen.append({name: p.detach().clone() for name, p in own.items()})

    trainer.add_callback(Remember())
    return trainer, own, seen


def first_trained(line, model) -> str:
    """Path of the method's own module that first returns a tensor with a gradient; fused paths call few of them."""
    called, hooks = [], []
    for name, module in model.named_modules():
        if line.container in name.split("."):

            def note(module, arguments, output, name=name):
                if isinstance(output, torch.Tensor) and output.requires_grad:
                    called.append(name)

            hooks.append(module.register_forward_hook(note))
    model.train()(input_ids=IDS, labels=IDS)
    for hook in hooks:
        hook.remove()
    return called[0]


@pytest.mark.parametrize("what", ["value", "gradient"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_module_is_named_and_the_weights_are_kept(line, what, accumulation, tmp_path):
    if line is LINES["disp"] and what == "value":
        return  # torch refuses to draw channels from such a value, before there is a loss
    model = line.model(init_weights=False)
    path = first_trained(line, model)
    model.get_submodule(path).register_forward_hook(Spoil(what))
    settings = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4, "save_steps": 1}
    trainer, own, seen = run(line, tmp_path, model, save_strategy="steps" if accumulation == 1 else "no", **settings)
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    step = len(seen) + 1
    assert f"of step {step} is NaN or infinite" in str(error.value) and step <= 2
    assert path in str(error.value) or what == "gradient"
    assert "is the first that is not finite" in str(error.value)
    if seen:
        assert "checkpoint-1" in str(error.value)
        assert all(torch.equal(parameter, seen[-1][name]) for name, parameter in own.items() if name in seen[-1])


def test_weights_that_are_not_finite_are_named(tmp_path):
    line = LINES["qst"]
    model = line.model()
    name, parameter = list(line.own(model).items())[-1]
    parameter.data.view(-1)[0] = torch.nan
    trainer, *_ = run(line, tmp_path, model)
    with pytest.raises(FloatingPointError, match=f"the weights of {name} are not finite"):
        trainer.train()


def test_a_sound_run_is_the_same_with_it(line, tmp_path):
    ends = []
    for watched in (False, True):
        torch.manual_seed(3)
        model = line.model()
        trainer = plain_trainer(model, tmp_path, token_dataset(16), max_steps=3, per_device_train_batch_size=4)
        if watched:
            trainer.add_callback(NonFiniteCallback())
        trainer.train()
        ends.append({name: p.detach().clone() for name, p in line.own(model).items()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not model._forward_hooks and not model._forward_pre_hooks


class Scaled:
    """What the callback sees of an optimizer with a loss scaler."""

    scaler = object()


def test_a_loss_scaler_may_skip_steps(tmp_path):
    model = LINES["qst"].model()
    trainer = plain_trainer(model, tmp_path)
    callback = NonFiniteCallback(skipped=2)
    parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.grad = torch.full_like(parameter, torch.inf)
    for _ in range(2):
        callback.on_pre_optimizer_step(trainer.args, trainer.state, None, model=model, optimizer=Scaled())
    with pytest.raises(FloatingPointError):
        callback.on_pre_optimizer_step(trainer.args, trainer.state, None, model=model, optimizer=Scaled())


@pytest.mark.parametrize("skipped", [-1, 1.5, True])
def test_a_bad_argument_is_named(skipped):
    with pytest.raises(ValueError, match="skipped must be an integer >= 0"):
        NonFiniteCallback(skipped)
