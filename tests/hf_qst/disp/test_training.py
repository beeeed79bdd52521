"""DISP through the real trainers: the budget term, frozen bases, accumulation, checkpointing, resuming."""

import logging
import math

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, default_data_collator
from trl import SFTConfig, SFTTrainer

from hf_qst import DISPCallback, DISPConfig
from hf_qst.disp.auxiliary_loss import with_auxiliary_loss
from tests.architectures import digest, in_nf4, tiny, token_batch
from tests.distributed.processes import in_processes
from tests.pruned_models import network, with_disp
from tests.toy_data import text_dataset, token_dataset, tokenizer
from tests.trainers import assert_states_close, disp_state, disp_trainer, plain_trainer

IDS = token_batch(4, 12)


def gradients(model):
    return {name: p.grad.clone() for name, p in network(model).named_parameters() if p.grad is not None}


# --- the loss term -----------------------------------------------------------------------------------------------------


def test_added_loss_back_propagates_as_if_it_were_in_the_loss():
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    hidden = with_auxiliary_loss(x * w, w.square().sum(), 0.25)
    (3 * hidden.sum()).backward()
    found = x.grad.clone(), w.grad.clone()
    x.grad = w.grad = None
    (3 * (x * w).sum() + 0.25 * w.square().sum()).backward()
    assert torch.equal(found[0], x.grad)
    torch.testing.assert_close(found[1], w.grad)


@pytest.mark.parametrize(("bias", "sign"), [(3.0, 1), (-2.0, -1)])
def test_budget_term_pulls_towards_the_budget_from_both_sides(bias, sign):
    net = network(with_disp(keep_ratio=0.5, initial_bias=bias, hypernetwork="none"))
    sample = net.sample()
    ratio = sample.ratio.item()
    assert (ratio > 0.5) is (sign > 0)
    assert sample.penalty.item() == pytest.approx(6.0 * abs(math.log(ratio / 0.5)), rel=1e-3)
    sample.penalty.backward()
    gradient = torch.cat([p.grad for p in net.hypernetwork.parameters()])
    assert (gradient * sign > 0).all()


def test_start_keeps_most_channels_and_everything_when_hardened_to_one():
    model = with_disp(keep_ratio=1.0)
    with torch.no_grad():
        expected = tiny("llama")(IDS).logits
        assert torch.equal(model.eval()(input_ids=IDS).logits, expected)
    kept = torch.cat(network(model).sample().gates).mean().item()
    assert 0.92 < kept < 0.98


def test_a_pruned_channel_still_has_a_gradient():
    """Gating the MLP once, after its two branches have met; gated twice, the gradient of a dropped channel is zero."""
    model = with_disp("llama", initial_bias=0.0).train()
    net = network(model)
    sample = net.sample()
    gates = [g.detach().requires_grad_() for g in sample.gates]
    with model.base_model.disp_layer.gates.using(gates):
        model.base_model.disp_layer.base_layer(input_ids=IDS, use_cache=False)[0].square().sum().backward()
    for gate in gates:
        dropped = gate.detach() == 0
        assert dropped.any() and (gate.grad[dropped] != 0).float().mean() > 0.9


# --- accumulation, checkpointing, processes ----------------------------------------------------------------------------


def penalty_gradients(model, steps):
    """Gradients of the budget term alone over one optimiser step of `steps` micro-batches of the same draw."""
    layer = model.base_model.disp_layer
    layer.accumulation_steps = steps
    model.train().zero_grad()
    for _ in range(steps):
        torch.manual_seed(7)
        (model(input_ids=IDS[:1], labels=IDS[:1]).loss * 0).backward()
    return gradients(model)


def test_budget_term_counts_once_for_each_optimiser_step():
    model = with_disp()
    assert_states_close(penalty_gradients(model, 4), penalty_gradients(model, 1), atol=1e-6, rtol=1e-5)


class _SameDraw(DISPCallback):
    """Every forward draws the same gates, so that a step can be compared with one on a larger batch."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        super().on_step_begin(args, state, control, model=model, **kwargs)
        net = network(model)
        if not hasattr(net, "sample_freely"):
            net.sample_freely = net.sample

            def sample():
                with torch.random.fork_rng():
                    torch.manual_seed(state.global_step)
                    return net.sample_freely()

            net.sample = sample


@pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer"])
def test_accumulated_batches_train_as_one_large_batch(tmp_path, kind):
    """28 rows: the last step of an epoch has fewer micro-batches than the others."""
    results = {}
    for steps in (1, 4):
        torch.manual_seed(0)
        size = {"per_device_train_batch_size": 8 // steps, "gradient_accumulation_steps": steps, "max_steps": 8}
        # SGD: Adam would hide a gradient that is scaled wrongly.
        size |= {"optim": "sgd", "learning_rate": 0.05, "weight_decay": 0.0}
        data = token_dataset(28)
        if kind == "Trainer":
            model = with_disp()
            run = disp_trainer(model, tmp_path, _SameDraw(progress=False), data, **size)
        else:
            arguments = SFTConfig(
                str(tmp_path), report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, use_cpu=True,
                bf16=False, gradient_checkpointing=False, lr_scheduler_type="constant", max_grad_norm=0.0, seed=3, **size,
            )  # fmt: skip
            run = SFTTrainer(
                tiny("llama"), arguments, train_dataset=data.remove_columns("labels"), processing_class=tokenizer(),
                peft_config=DISPConfig(task_type="CAUSAL_LM"),
            )  # fmt: skip
            run.add_callback(_SameDraw(progress=False))
            model = run.model
        before = disp_state(model)
        run.train()
        results[steps] = {n: t - before[n] for n, t in disp_state(model).items() if t.is_floating_point()}
    moved = torch.cat([t.flatten() for t in results[1].values()])
    assert moved.abs().max() > 1e-3
    assert_states_close(results[4], results[1], atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "phi", "opt"])
def test_gradient_checkpointing_changes_nothing(name, use_reentrant):
    found = {}
    for checkpointing in (False, True):
        model = with_disp(name)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.train()
        torch.manual_seed(1)
        first = model(input_ids=IDS, labels=IDS).loss
        # Another forward before the first one's backward: recomputing must see the gates of its own.
        second = model(input_ids=IDS[:2], labels=IDS[:2]).loss
        (first + second).backward()
        found[checkpointing] = gradients(model)
    assert_states_close(found[True], found[False], atol=1e-6, rtol=1e-4)


def test_checkpointing_really_recomputes():
    model = with_disp()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls = []
    model.get_submodule("base_model.model.model.layers.0.self_attn").register_forward_pre_hook(
        lambda *a: calls.append(1)
    )
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert len(calls) == 2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_leaves_no_trace_in_an_unloaded_model(use_reentrant):
    model = with_disp()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    base = model.unload()
    base.enable_input_require_grads()
    base.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert "DISP" not in repr([block._gradient_checkpointing_func for block in base.model.layers])
    assert "Gates" not in repr([block._gradient_checkpointing_func for block in base.model.layers])


# --- what the base does in training mode alone -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt2", {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.5}),  # modules
        ("llama", {"attention_dropout": 0.5}),  # a function that asks for the mode of its module
        ("opt", {"dropout": 0.5}),  # in the blocks themselves
        ("opt", {"dropout": 0.0, "layerdrop": 0.5}),
    ],
)
def test_dropout_of_the_base_acts_in_training_and_is_told(name, changes, caplog):
    with caplog.at_level(logging.WARNING):
        model = with_disp(model=tiny(name, **changes))
    assert all(f"{key}={rate}" in caplog.text for key, rate in changes.items() if rate)
    layer = model.base_model.disp_layer

    def run():
        with layer.gates.using([None] * 15):
            return layer.base_layer(input_ids=IDS)[0]

    model.train()
    torch.manual_seed(0)
    assert not torch.equal(run(), run())
    model.eval()
    assert torch.equal(run(), run())


def test_a_base_without_dropout_is_no_reason_for_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        with_disp()
    assert "drop" not in caplog.text


@pytest.mark.parametrize("native", [False, True])
def test_neftune_adds_its_noise(tmp_path, native):
    losses = {}
    for alpha in (None, 5.0, 50.0):
        if native:
            model = tiny("llama")
            model.add_adapter(DISPConfig(task_type="CAUSAL_LM"))
        else:
            model = with_disp()
        run = plain_trainer(model, tmp_path, max_steps=2, neftune_noise_alpha=alpha)
        run.add_callback(DISPCallback(progress=False))
        run.train()
        losses[alpha] = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        assert run.evaluate()["eval_loss"] == run.evaluate()["eval_loss"]
    assert all(abs(noisy - plain) > 0.01 for noisy, plain in zip(losses[50.0], losses[None], strict=True))
    assert losses[5.0] != losses[None]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_switched_off_in_training_it_is_the_bases_own_loss(name, checkpointing):
    base = tiny(name).train()
    torch.manual_seed(3)
    right = base(input_ids=IDS, labels=IDS).loss
    model = with_disp(name).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(input_ids=IDS, labels=IDS).loss.backward()
    before = gradients(model)
    with model.disable_adapter():
        torch.manual_seed(3)
        found = model(input_ids=IDS, labels=IDS).loss
    assert torch.equal(found, right)
    assert_states_close(gradients(model), before, atol=0, rtol=0)


# --- two processes -----------------------------------------------------------------------------------------------------


def gradients_of_half():
    rank, model = dist.get_rank(), with_disp()
    wrapped = DistributedDataParallel(model)
    model.train()
    torch.manual_seed(5)
    wrapped(input_ids=IDS[rank * 2 : rank * 2 + 2], labels=IDS[rank * 2 : rank * 2 + 2]).loss.backward()
    return gradients(model), disp_state(model)


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one_with_both_batches(tmp_path):
    results = in_processes(2, gradients_of_half, tmp_path)
    model = with_disp().train()
    torch.manual_seed(5)
    model(input_ids=IDS, labels=IDS).loss.backward()
    for found, weights in results:
        assert_states_close(found, gradients(model), atol=1e-6, rtol=1e-4)
        assert torch.equal(weights["hypernetwork.embeddings"], network(model).hypernetwork.embeddings)


# --- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float32", "nf4"])
def test_budget_is_reached_the_base_stays_and_only_the_hypernetwork_trains(tmp_path, kind):
    base = in_nf4(tmp_path / "base") if kind == "nf4" else tiny("llama")
    model = with_disp(model=base, start_scores="none")
    before = digest(base, skip="disp_net")
    embeddings = network(model).hypernetwork.embeddings.clone()
    callback = DISPCallback(progress=False)
    run = disp_trainer(model, tmp_path / "out", callback, max_steps=60)
    run.train()
    history = [entry for entry in run.state.log_history if "kept_ratio" in entry]
    assert len(history) == 60
    assert history[0]["kept_ratio"] > 0.85
    assert sum(entry["kept_ratio"] for entry in history[-10:]) / 10 == pytest.approx(0.5, abs=0.06)
    assert history[-1]["budget_term"] < history[0]["budget_term"]
    assert digest(base, skip="disp_net") == before
    assert torch.equal(network(model).hypernetwork.embeddings, embeddings)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "disp_net" in n
    }
    assert 0.496 <= callback.report.ratio <= 0.5


def test_stronger_regularisation_is_faster(tmp_path):
    kept = {}
    for weight in (1.0, 6.0):
        run = disp_trainer(with_disp(regularization=weight, start_scores="none"), tmp_path, max_steps=15)
        run.train()
        kept[weight] = [e["kept_ratio"] for e in run.state.log_history if "kept_ratio" in e][-1]
    assert kept[6.0] < kept[1.0] - 0.03


@pytest.mark.parametrize("hypernetwork", ["gru", "linear", "none"])
@pytest.mark.parametrize("estimator", ["reinmax", "reinmax_as_printed", "straight_through", "gumbel_sigmoid"])
def test_every_variant_trains(tmp_path, estimator, hypernetwork):
    model = with_disp(
        estimator=estimator, hypernetwork=hypernetwork, selections=["mlp_middle", "attention_in"], keep_ratio=0.8
    )
    before = disp_state(model)
    run = disp_trainer(model, tmp_path, max_steps=3)
    run.train()
    after = disp_state(model)
    assert any(not torch.equal(after[n], before[n]) for n in after if n != "kept")
    assert (
        0.79
        < network(model).plan.parameters([int(m.sum()) for m in network(model).hardened()])
        / network(model).layout.total
        <= 0.8
    )


def test_evaluation_is_of_the_hardened_model_without_the_budget_term(tmp_path):
    model = with_disp(awake=True)
    run = disp_trainer(model, tmp_path)
    first, second = run.evaluate()["eval_loss"], run.evaluate()["eval_loss"]
    assert first == second
    small = with_disp(awake=True).merge_and_unload()
    plain = Trainer(small, run.args, eval_dataset=run.eval_dataset, data_collator=default_data_collator)
    assert plain.evaluate()["eval_loss"] == pytest.approx(first, abs=1e-5)


def test_resumed_training_gives_the_weights_of_an_uninterrupted_run(tmp_path):
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "gradient_accumulation_steps": 3}
    settings |= {"per_device_train_batch_size": 4}
    straight = with_disp()
    first = disp_trainer(straight, tmp_path / "straight", **settings)
    first.train()
    resumed = with_disp(seed=9)
    run = disp_trainer(resumed, tmp_path / "resumed", **settings)
    run.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-4"))
    assert run.state.global_step == 8
    assert_states_close(disp_state(resumed), disp_state(straight), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["float32", "nf4"])
def test_sft_trainer_reaches_the_budget(tmp_path, kind):
    arguments = SFTConfig(
        str(tmp_path), per_device_train_batch_size=4, learning_rate=3e-3, max_steps=60, report_to=[], save_strategy="no",
        logging_steps=1, disable_tqdm=True, use_cpu=True, max_length=16, bf16=False, lr_scheduler_type="constant",
        gradient_checkpointing=True, dataset_text_field="text",
    )  # fmt: skip
    run = SFTTrainer(
        in_nf4(tmp_path / "base") if kind == "nf4" else tiny("llama"), arguments, train_dataset=text_dataset(64),
        processing_class=tokenizer(), peft_config=DISPConfig(task_type="CAUSAL_LM"),
    )  # fmt: skip
    run.add_callback(DISPCallback(progress=False))
    run.train()
    kept = [entry["kept_ratio"] for entry in run.state.log_history if "kept_ratio" in entry]
    assert sum(kept[-10:]) / 10 == pytest.approx(0.5, abs=0.06)
    # In bfloat16, what SFTTrainer makes of it on a quantised base, small steps would be lost.
    assert {p.dtype for p in network(run.model).parameters()} == {torch.float32}


# --- the callback ------------------------------------------------------------------------------------------------------
