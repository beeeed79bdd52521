"""The final choice of DISP follows from the parameters as they are now, however they came to be so."""

import copy

import pytest
import torch
from transformers import EarlyStoppingCallback

from hf_qst import DISPCallback, DISPConfig
from hf_qst.disp.selection import SelectionNetwork, UndecidableError
from hf_qst.pruning.widths import best_channels, widths_on_budget
from tests.architectures import tiny, token_batch
from tests.pruned_models import network, with_disp
from tests.trainers import plain_trainer

IDS = token_batch(4, 12)


def flat(model):
    return torch.cat([mask for block in model.base_model.disp_masks() for mask in block.values()])


def from_scratch(net):
    """The choice that the numbers of a network lead to, in a network that never chose before."""
    fresh = SelectionNetwork(net.config, net.layout, net.budget)
    fresh.load_state_dict(net.state_dict())
    logits = fresh.logits()
    return torch.cat(best_channels(logits, widths_on_budget(logits, net.plan, net.budget)))


def chosen(model):
    return torch.cat(network(model).hardened())


# --- looks before and during training ----------------------------------------------------------------------------------


def evaluate(model, run):
    run.evaluate()


def report(model, run):
    model.base_model.disp_report()


def masks(model, run):
    model.base_model.disp_masks()


def generate(model, run):
    model.generate(input_ids=IDS, max_new_tokens=2)


def forward_with_gradients(model, run):
    model.eval()(input_ids=IDS)


@torch.inference_mode()
def forward_in_inference_mode(model, run):
    model.eval()(input_ids=IDS)


LOOKS = [evaluate, report, masks, generate, forward_with_gradients, forward_in_inference_mode]
SETTINGS = {"learning_rate": 1e-2, "max_grad_norm": 0.0, "max_steps": 8}


@pytest.mark.parametrize("look", LOOKS, ids=lambda look: look.__name__)
def test_a_look_before_training_changes_nothing(look, tmp_path):
    model = with_disp()
    run = plain_trainer(model, tmp_path, **SETTINGS)
    run.add_callback(DISPCallback(progress=False))
    look(model, run)
    before = flat(model)
    run.train()
    assert torch.equal(chosen(model), from_scratch_unhardened(model))
    assert not torch.equal(flat(model), before)


def from_scratch_unhardened(model):
    """As `from_scratch`, of a hardened network as it was before."""
    net = copy.deepcopy(network(model))
    net.kept.fill_(2)
    return from_scratch(net)


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit", "lion_8bit", "adafactor", "sgd"])
def test_every_optimiser_is_seen(name, tmp_path):
    model = with_disp()
    run = plain_trainer(model, tmp_path, **{**SETTINGS, "optim": name, "eval_strategy": "steps", "eval_steps": 2})
    seen = []
    run.add_callback(DISPCallback(progress=False))
    run.evaluate()
    seen.append(flat(model))
    run.train()
    assert torch.equal(chosen(model), from_scratch_unhardened(model))
    if name != "sgd":  # whose steps are too small to change the choice
        assert not torch.equal(flat(model), seen[0])


def test_plots_and_evaluations_while_training_show_the_choice_of_their_step(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("hf_qst_plugins.pruning.callback.plot_widths", lambda masks, path, title: drawn.append(masks))
    model, expected = with_disp(), []

    class Reference(DISPCallback):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            expected.append(from_scratch(network(model)))

    run = plain_trainer(model, tmp_path, **SETTINGS, eval_strategy="steps", eval_steps=1)
    run.add_callback(Reference(progress=False, plot_directory=tmp_path / "plots", plot_steps=1))
    run.train()
    shown = [torch.cat([mask for block in masks for mask in block.values()]) for masks in drawn]
    assert len(shown) == 9
    for step, mask in enumerate(expected):
        assert torch.equal(shown[step], mask)
    assert torch.equal(shown[-1], expected[-1]) and not torch.equal(shown[0], shown[-1])


def test_early_stopping_hardens_the_best_model(tmp_path):
    model = with_disp(awake=True)
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    run = plain_trainer(model, tmp_path, **{**SETTINGS, "max_steps": 12, **settings})
    run.add_callback(DISPCallback(progress=False))
    run.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert torch.equal(chosen(model), from_scratch_unhardened(model))
    assert run.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-6)


# --- every way of writing ----------------------------------------------------------------------------------------------


def write_data(parameter, noise):
    parameter.data.add_(noise)


def assign_data(parameter, noise):
    parameter.data = parameter.data + noise


def write_through_numpy(parameter, noise):
    parameter.detach().numpy()[...] += noise.numpy()


def write_under_no_grad(parameter, noise):
    with torch.no_grad():
        parameter.add_(noise)


@pytest.mark.parametrize("kind", ["gru", "linear", "none"])
@pytest.mark.parametrize("write", [write_data, assign_data, write_through_numpy, write_under_no_grad])
def test_every_kind_of_writing_is_seen(write, kind):
    model = with_disp(hypernetwork=kind)
    with torch.no_grad():
        before = flat(model), model.eval()(input_ids=IDS).logits
        generator = torch.Generator().manual_seed(1)
        for parameter in network(model).hypernetwork.parameters():
            write(parameter.detach() if write is write_through_numpy else parameter,
                  torch.randn(parameter.shape, generator=generator))  # fmt: skip
        after = flat(model), model(input_ids=IDS).logits
    assert torch.equal(after[0], from_scratch(network(model)))
    assert not torch.equal(after[0], before[0]) and not torch.equal(after[1], before[1])


def test_a_choice_written_into_the_buffer_is_seen():
    model = with_disp(awake=True)
    model.base_model.disp_masks()
    other = with_disp(awake=True, keep_ratio=0.7)
    network(model).kept.data.copy_(torch.cat(network(other).hardened()))
    assert network(model).is_hardened and torch.equal(flat(model), flat(other))
    network(model).kept.data.fill_(2)
    assert torch.equal(flat(model), from_scratch(network(model)))


def test_settings_that_change_are_seen():
    model = with_disp(awake=True)
    ratio = model.base_model.disp_report().ratio
    network(model).config.hardening = "threshold"
    assert abs(model.base_model.disp_report().ratio - ratio) > 0.05


def test_an_unchanged_choice_is_not_made_again():
    net = network(with_disp(awake=True))
    assert net._decision() is net._decision()


# --- autograd modes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hardened", [False, True])
def test_gates_of_inference_mode_serve_a_forward_with_gradients(hardened):
    model = with_disp(awake=True)
    if hardened:
        model.base_model.harden()
    with torch.inference_mode():
        expected = model.eval()(input_ids=IDS).logits
    embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
    found = model(inputs_embeds=embeddings).logits
    found.square().sum().backward()
    assert torch.equal(found, expected) and embeddings.grad.abs().sum() > 0


def test_evaluation_with_gradients_passes_them_through_the_hardened_gates():
    """Straight through: the derivative for a gate, times that of sigmoid(z)."""
    model = with_disp(awake=True, hypernetwork="none")
    net = network(model)
    model.eval()(input_ids=IDS).logits.square().sum().backward()
    gates = [mask.float().requires_grad_() for mask in net.hardened()]
    with model.base_model.disp_layer.gates.using(gates):
        base = model.base_model.disp_layer.base_layer
        model.get_output_embeddings()(base(input_ids=IDS, use_cache=False)[0]).square().sum().backward()
    for gate, parameter in zip(gates, net.hypernetwork.parameters(), strict=True):
        kept = torch.sigmoid(parameter.detach() + net.config.initial_bias)
        torch.testing.assert_close(parameter.grad, gate.grad * kept * (1 - kept), atol=1e-6, rtol=1e-4)


def test_logits_that_are_not_finite_make_no_choice():
    model = with_disp()
    next(network(model).hypernetwork.parameters()).data[0] = torch.nan
    with pytest.raises(UndecidableError, match="NaN or infinity"):
        model.base_model.disp_report()


# --- how an adapter starts ---------------------------------------------------------------------------------------------


def test_init_weights_false_starts_far_away_and_elsewhere_each_time():
    with pytest.raises(ValueError, match=r"DISPConfig\.init_weights must be True or False, got 1"):
        DISPConfig(init_weights=1)
    usual, again = with_disp(), with_disp()
    bases = [tiny("llama") for _ in range(2)]  # which sets the seed
    first, second = (with_disp(model=base, init_weights=False) for base in bases)
    spread = [torch.cat(network(model).logits()).std() for model in (usual, first)]
    assert spread[1] > 5 * spread[0]
    assert torch.equal(flat(usual), flat(again)) and not torch.equal(flat(first), flat(second))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_a_network_in_half_precision_are_computed_in_float32(dtype):
    net = network(with_disp(model=tiny("llama"), awake=True))
    with torch.no_grad():
        for parameter in net.hypernetwork.parameters():
            parameter.copy_(parameter.to(dtype))
    expected = net.logits()
    half = copy.deepcopy(net)
    for parameter in half.hypernetwork.parameters():
        parameter.data = parameter.data.to(dtype)
    assert all(torch.equal(a, b) for a, b in zip(half.logits(), expected, strict=True))
