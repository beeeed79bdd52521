"""Training on stored states computes what training in the model computes."""

import copy
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model

from benchmarks.common.merging import united
from benchmarks.side_tuning.real_model import PROBE, Bench, one_run
from benchmarks.side_tuning.real_model_report import best_runs, next_rate, picture, table
from benchmarks.side_tuning.stored_states import StoredBase, hidden, last_blocks, states_read
from benchmarks.side_tuning.tasks import IGNORED, Batch, Task, accuracy
from hf_qst import QSTConfig
from tests.architectures import tiny, token_batch


@pytest.mark.parametrize("tail", [0, 1])
def test_loss_and_gradients_are_those_of_the_model(tail):
    base = tiny("llama", num_hidden_layers=3)
    ids = token_batch(2, 12)
    labels = ids.clone()
    labels[0, :7] = IGNORED
    batch = Batch(ids, labels)
    stored = StoredBase(base)
    stored.check(batch)
    settings = {"r": 4, "side_every": 1, "tail_layers": tail, "tail_rank": 4, "tap_storage": "full"}
    config = QSTConfig(task_type="CAUSAL_LM", init_weights=False, **settings)
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(base), config).train()
    step = stored.step(batch, states_read(model.base_model.model.model))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    losses, gradients = [], []
    for loss in (
        lambda: model(input_ids=ids, labels=labels).loss,
        lambda: stored.loss(hidden(model.base_model.model.model, step), batch),
    ):
        losses.append(loss())
        gradients.append(torch.autograd.grad(losses[-1], list(parameters.values())))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=0)
    for name, a, b in zip(parameters, *gradients, strict=True):
        assert (a - b).norm() <= 0.01 * a.norm() + 1e-6, name  # the states are rounded to float16


def test_the_last_blocks_of_a_base_get_the_same_from_a_stored_state():
    base = tiny("llama", num_hidden_layers=3)
    batch = Batch(token_batch(2, 12), token_batch(2, 12))
    step = StoredBase(base).step(batch, {2})
    assert set(step.rows[0].states) == {2}
    torch.testing.assert_close(last_blocks(base.model, 2, step.state(2), step), step.output, rtol=0, atol=1e-2)


def test_a_row_that_was_in_a_batch_before_is_not_computed_again():
    base = tiny("llama", num_hidden_layers=3)
    ids, stored = token_batch(2, 12), StoredBase(base)
    calls = []
    stored.layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    first = stored.step(Batch(ids, ids), {1, 2})
    again = stored.step(Batch(ids.flip(0), ids.flip(0)), {2})
    assert len(calls) == 1
    torch.testing.assert_close(again.state(2), first.state(2).flip(0), rtol=0, atol=0)
    torch.testing.assert_close(again.output, first.output.flip(0), rtol=0, atol=0)
    stored.step(Batch(ids, ids), {3})
    assert len(calls) == 2


def test_accuracy_is_the_part_of_rows_whose_class_scores_higher():
    ids = torch.tensor([[1, 5, 0], [1, 2, 6]])
    labels = torch.tensor([[IGNORED, 5, IGNORED], [IGNORED, IGNORED, 6]])
    scores = torch.zeros(2, 3, 2)
    scores[0, 0] = torch.tensor([2.0, 1.0])  # row 0 answers at place 1: class 5, right
    scores[1, 1] = torch.tensor([3.0, 1.0])  # row 1 answers at place 2: class 5, wrong
    task = Task([], [Batch(ids, labels)], [], [5, 6])
    assert accuracy(task, [scores]) == 50.0


def classification(rows: int = 16) -> Task:
    """Token 5 is the answer after a prompt with token 3 in it, token 6 after one with token 4."""
    ids = torch.randint(8, 20, (rows, 6), generator=torch.Generator().manual_seed(0))
    ids[:, 2] = torch.arange(rows) % 2 + 3
    ids[:, 4] = ids[:, 2] + 2
    labels = torch.full_like(ids, IGNORED)
    labels[:, 4] = ids[:, 4]
    return Task([Batch(ids, labels)], [Batch(ids, labels)], [Batch(ids, ids)], [5, 6])


def test_the_prompt_ends_before_the_place_that_predicts_the_first_label():
    assert classification(1).train[0].prompt.tolist() == [[True, True, True, False, False, False]]


def test_a_linear_probe_finds_the_class_in_the_states():
    bench = Bench(tiny("llama", num_hidden_layers=3), classification(), [PROBE])
    figures = one_run(bench, PROBE, 1, 1e-3, 0)
    assert figures["accuracy"] == 100.0
    assert figures["loss"] < 0.3


def test_a_directed_readout_reads_what_a_readout_of_full_rank_would_learn_first():
    base, task = tiny("llama", num_hidden_layers=3), classification()
    bench = Bench(base, replace(task, train=task.train * 2), ["default"])
    model = get_peft_model(copy.deepcopy(base), QSTConfig(task_type="CAUSAL_LM", readout_rank=2))
    layer = model.base_model.model.model
    bench.stored.direct_readout(layer, bench.train)
    step, labels = bench.train[0], task.train[0].labels[:, 1:].flatten()
    for i, linear in layer.active_network().readout.down.items():
        full = torch.zeros(2 * (base.config.hidden_size,), requires_grad=True)
        x = torch.nn.functional.rms_norm(step.state(int(i) + 1), [base.config.hidden_size])
        scores = (step.output + x @ full.T)[:, :-1] @ bench.stored.head.T
        loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), labels, ignore_index=IGNORED)
        (gradient,) = torch.autograd.grad(loss, full)
        expected = torch.linalg.svd(gradient).Vh[:2]
        directions = torch.nn.functional.normalize(linear.weight.detach())
        torch.testing.assert_close((directions @ expected.T).abs(), torch.eye(2), rtol=0, atol=1e-2)
        torch.testing.assert_close(linear(x).square().mean((0, 1)), torch.full((2,), 1 / 3), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "name",
    [
        "default",
        "readout at twice the rate",
        "readout by the gradient",
        "LoRA in the last 4",
        "ShadowPEFT",
        "head alone",
    ],
)
def test_a_method_learns_and_its_validation_loss_is_that_of_the_same_rows(name):
    task = classification()
    bench = Bench(
        tiny("llama", num_hidden_layers=5), replace(task, train=task.train * 20, validation=task.held), [name]
    )
    figures, start = one_run(bench, name, 20, 1e-2, 0), bench.base_figures()
    assert figures["loss"] < start["loss"]
    assert figures["validation_loss"] == figures["loss"]


def test_an_output_that_is_held_to_the_bases_stays_nearer_to_it():
    bench = Bench(tiny("llama", num_hidden_layers=3), classification(), ["default"])
    bench.train *= 20
    config = QSTConfig(task_type="CAUSAL_LM", r=4)
    (free, _), (near, _) = (bench.side(config, 20, 1e-2, near=weight) for weight in (0.0, 100.0))
    start = bench.base_figures()
    assert abs(near["old_loss"] - start["old_loss"]) < abs(free["old_loss"] - start["old_loss"])
    assert near["loss"] < start["loss"]


def valued(rate, validation, seed=0, **more):
    return {"method": "default", "rate": rate, "seed": seed, "loss": 1.0, "validation_loss": validation, **more}


def test_a_sweep_doubles_or_halves_the_best_rate_until_it_lies_between_two_others():
    runs = [valued(1e-3, 3.0), valued(2e-3, 2.0)]
    assert next_rate(runs) == [4e-3]
    assert next_rate([*runs, valued(4e-3, 2.5)]) == []
    assert next_rate([valued(1e-3, 2.0), valued(2e-3, 3.0)]) == [5e-4]
    assert next_rate([valued(1e-3, 2.0), valued(2e-3, float("nan"))]) == [5e-4]
    assert next_rate([valued(2**i, -i) for i in range(6)]) == []


def test_the_rate_is_chosen_by_the_validation_loss_with_the_seeds_that_all_rates_have():
    # With seed 1 alone, or by the held-out loss, it would be 2e-3.
    runs = [valued(1e-3, 1.0), valued(1e-3, 9.0, seed=1), valued(2e-3, 2.0, loss=0.5)]
    assert best_runs(runs) == {"default": runs[:2]}


def test_runs_without_a_validation_loss_are_compared_by_the_held_out_one():
    old = {"method": "default", "rate": 1e-3, "seed": 0, "loss": 2.0}
    runs = [old, valued(2e-3, 1.5, loss=2.1), valued(4e-3, 1.6, loss=2.2)]
    assert best_runs(runs) == {"default": [old]}
    # Where all have one, it is the validation loss.
    assert best_runs([*runs[1:], valued(1e-3, 1.7, loss=2.0)]) == {"default": [runs[1]]}


def test_merged_results_have_the_runs_of_all():
    one = {"tasks": {"prose, 40": {"base": {"loss": 3.0}, "runs": [valued(1e-3, 1.0)]}}, "commit": "a"}
    other = {"tasks": {"prose, 40": {"runs": [valued(1e-3, 2.0), valued(2e-3, 1.0)]}}, "cost": {"default": {}}}
    result = united([one, other])
    assert result["tasks"]["prose, 40"] == {"base": {"loss": 3.0}, "runs": other["tasks"]["prose, 40"]["runs"]}
    assert result["cost"] == {"default": {}}
    assert result["commit"] == "a"


def test_the_table_lists_each_method_at_its_best_rate(tmp_path):
    def run(method, rate, seed, loss):
        return {"method": method, "rate": rate, "seed": seed, "loss": loss, "old_loss": 1.0, "parameters": 2e6}

    runs = [run("default", 1e-3, 0, 3.0), run("default", 2e-3, 0, 2.6), run("default", 2e-3, 1, 2.4)]
    runs += [run("QLoRA", 1e-3, 0, 2.0)]
    task = {"base": {"loss": 3.0, "old_loss": 1.0}, "runs": runs}
    result = {"tasks": {"prose, 40": task}, "cost": {"default": {"seconds": 1.5, "kept_bytes": 2**21}}}
    text = table(result)
    picture(result, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 0
    assert "| default | 0.002 | 2 | 2.500 (0.200) | 50 % | 1.000 | 2.00 |" in text
    assert "| default | 1.50 | 2 |" in text
