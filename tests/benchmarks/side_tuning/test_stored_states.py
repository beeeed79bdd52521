"""Training on stored states computes what training in the model computes."""

import copy

import pytest
import torch
from peft import get_peft_model

from benchmarks.side_tuning.real_model import PROBE, Bench, one_run
from benchmarks.side_tuning.real_model_report import picture, table
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
    assert set(step.states) == {2}
    torch.testing.assert_close(last_blocks(base.model, 2, step.states[2].float(), step), step.output, rtol=0, atol=1e-2)


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


def test_an_output_that_is_held_to_the_bases_stays_nearer_to_it():
    bench = Bench(tiny("llama", num_hidden_layers=3), classification(), ["default"])
    bench.train *= 20
    free, near = (bench.side(QSTConfig(task_type="CAUSAL_LM", r=4), 20, 1e-2, weight) for weight in (0.0, 100.0))
    start = bench.base_figures()
    assert abs(near["old_loss"] - start["old_loss"]) < abs(free["old_loss"] - start["old_loss"])
    assert near["loss"] < start["loss"]


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
