"""DISP under torch.compile: the same losses, gradients and choices."""

import pytest
import torch

from hf_qst import DISPCallback
from tests.architectures import tiny, token_batch
from tests.pruned_models import network, with_disp
from tests.trainers import plain_trainer

IDS = token_batch(4, 12)
SMALL = {"num_hidden_layers": 1}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model_of(checkpointing=False, **settings):
    model = with_disp(model=tiny("llama", **SMALL), **settings)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def steps(model, run, count=2):
    """Losses, gradients and logged terms of some training forwards with one step of SGD between them."""
    found = []
    for step in range(count):
        torch.manual_seed(step)
        model.zero_grad()
        loss = run(input_ids=IDS, labels=IDS).loss
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in network(model).parameters()])
        layer = model.base_model.disp_layer
        found.append((loss.detach(), gradient, layer.last_penalty, layer.last_ratio))
        with torch.no_grad():
            for parameter in network(model).parameters():
                parameter.data.sub_(parameter.grad)
    return found


@pytest.mark.parametrize(
    "settings",
    [{}, {"estimator": "gumbel_sigmoid", "hypernetwork": "linear"}, {"checkpointing": True}],
    ids=["default", "gumbel", "checkpointing"],
)
def test_training_is_the_eager_one(settings):
    eager, compiled = model_of(**settings), model_of(**settings)
    right = steps(eager, eager)
    found = steps(compiled, torch.compile(compiled, backend="aot_eager"))
    for mine, theirs in zip(found, right, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_the_stack_is_compiled_as_a_whole():
    torch._dynamo.utils.counters.clear()
    model = model_of()
    steps(model, torch.compile(model, backend="eager"), 1)
    # What comes before the gates are drawn, and all that follows.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_evaluation_between_compiled_steps_follows_the_parameters():
    model = model_of(hypernetwork="none")
    compiled = torch.compile(model, backend="eager")
    for step in range(2):
        steps(model, compiled, 1)
        for parameter in network(model).parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step)))
        with torch.no_grad():
            found = compiled.eval()(input_ids=IDS).logits
            torch.testing.assert_close(found, model(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)
        compiled.train()


def test_trainer_compiles(tmp_path):
    logs = []
    for settings in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        model = with_disp(model=tiny("llama", **SMALL))
        size = {"max_steps": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
        run = plain_trainer(model, tmp_path, **size, **settings)
        run.add_callback(DISPCallback(progress=False))
        run.train()
        logs.append([entry[key] for entry in run.state.log_history if "loss" in entry
                     for key in ("loss", "kept_ratio", "budget_term")])  # fmt: skip
        assert network(model).is_hardened
    assert logs[1] == pytest.approx(logs[0], abs=1e-4)
