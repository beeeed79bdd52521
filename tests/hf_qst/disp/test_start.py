"""Where learning starts: at a pruning method's choice, from the user's data or the trainer's, and never twice."""

import logging

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from transformers import TrainerCallback

from hf_qst import DISPConfig
from hf_qst.base_model.decoder_stack import find_decoder_stack
from hf_qst.disp import layer as disp_layer
from hf_qst.disp.start import rows_of, share_start
from hf_qst.pruning import (
    PRUNING_METHODS,
    SELECTIONS,
    PruningLayout,
    PruningTask,
    SelectionMap,
    best_channels,
    comparable_scores,
    masks_by_layer,
    register_pruning_method,
    widths_on_budget,
)
from hf_qst.pruning.by_scores import prune_model
from hf_qst.pruning.scores import random_scores
from tests.architectures import digest, tiny, token_batch
from tests.distributed.processes import in_processes
from tests.pruned_models import network, with_disp
from tests.toy_data import token_dataset
from tests.trainers import assert_states_close, disp_state, disp_trainer


def batches(count=3):
    return [{"input_ids": token_batch(4, 10, seed=s)} for s in range(count)]


@pytest.mark.parametrize("settings", [{}, {"constraint": "layer"}, {"selections": ["mlp_middle", "mlp_in"]}])
def test_the_first_choice_is_the_methods(settings):
    data = batches()
    learned = with_disp(keep_ratio=0.6, calibration_data=data, **settings).merge_and_unload()
    assert digest(learned) == digest(prune_model(tiny("llama"), "fisher", 0.6, calibration_data=data, **settings))


@pytest.mark.parametrize("method", ["taylor", "flap", "magnitude"])
def test_the_first_choice_of_ranks_is_the_methods_but_for_ties(method):
    """Uniform widths come from ranks, of which each selection has the same: one channel of a selection may differ."""
    model, data = tiny("llama"), batches()
    stack = find_decoder_stack(model)
    layout = PruningLayout.of(stack)
    plan = SelectionMap.of(layout, SELECTIONS)
    scores = PRUNING_METHODS[method].score(PruningTask(model, stack, layout, data))
    owned = comparable_scores(method, scores, plan)
    expected = masks_by_layer(plan, best_channels(owned, widths_on_budget(owned, plan, int(0.6 * layout.total))))
    found = with_disp(model=model, keep_ratio=0.6, start_scores=method, calibration_data=data).disp_masks()
    for ours, theirs in zip(found, expected, strict=True):
        for name in SELECTIONS:
            assert (ours[name] != theirs[name]).sum() <= 1 < theirs[name].sum() < len(theirs[name])


@pytest.mark.parametrize("kind", ["gru", "linear", "none"])
def test_draws_are_on_the_budget_from_the_start_and_nearly_sure(kind):
    model = with_disp(keep_ratio=0.6, hypernetwork=kind, calibration_data=batches())
    logits = torch.cat(network(model).logits())
    assert logits.abs().max() < 6.01
    ratios = torch.stack([network(model).sample().ratio for _ in range(50)])
    assert ratios.mean().item() == pytest.approx(0.6, abs=0.01)
    # Another start than the paper's, where most draws are as sure as each other.
    paper = with_disp(keep_ratio=0.6, hypernetwork=kind, start_scores="none")
    assert torch.cat(network(paper).logits()).std() < 1 < logits.std()


@pytest.mark.parametrize("kind", ["gru", "none"])
@pytest.mark.parametrize("stays", [False, True])
def test_a_network_in_bfloat16_starts_as_well(kind, stays):
    """TRL casts it on a quantised base, for it to be float32 again in training; a user may want it to stay."""
    net = network(with_disp(hypernetwork=kind))
    if stays:
        net.cast(torch.bfloat16)
    else:
        net.hypernetwork.bfloat16()
    wanted = [torch.linspace(-6, 6, size) for size in net.plan.sizes]
    net.start_at(wanted)
    assert {p.dtype for p in net.hypernetwork.parameters()} == {torch.bfloat16 if stays else torch.float32}
    for found, logits in zip(net.logits(), wanted, strict=True):
        # 128 products with numbers of 8 bits.
        torch.testing.assert_close(found, logits, rtol=0, atol=0.1 if stays else 1e-4)


def test_the_papers_configuration_starts_as_the_paper_does():
    model = get_peft_model(tiny("llama"), DISPConfig.paper(task_type="CAUSAL_LM"))
    logits = torch.cat(network(model).logits())
    assert abs(logits.mean() - 3) < 0.1 and logits.min() > 0 and not network(model).awaits_start


class Seen(TrainerCallback):
    """The first tokens of every training batch, and the masks when training begins."""

    def __init__(self, model):
        self.rows, self.masks = [], None
        model.register_forward_pre_hook(self.note, with_kwargs=True)
        self.model = model

    def note(self, module, args, kwargs):
        if module.training:
            self.rows.append(kwargs["input_ids"][:, :3].clone())

    def on_step_begin(self, args, state, control, **kwargs):
        self.masks = self.masks or self.model.disp_masks()


def test_the_callback_takes_the_trainers_data_and_changes_nothing_of_its_order(tmp_path):
    seen = {}
    for start in (None, "none"):
        model = with_disp(keep_ratio=0.6, start_scores=start)
        trainer = disp_trainer(model, tmp_path, max_steps=3, data=token_dataset(200))
        seen[start] = Seen(model)
        trainer.add_callback(seen[start])
        trainer.train()
    for ours, papers in zip(seen[None].rows, seen["none"].rows, strict=True):
        assert torch.equal(ours, papers)
    data = rows_of(trainer.get_train_dataloader(), {"input_ids", "labels"}, 0)
    expected = with_disp(keep_ratio=0.6, calibration_data=data).disp_masks()
    for ours, theirs in zip(seen[None].masks, expected, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_rows_are_a_few_of_the_data_drawn_by_the_seed(tmp_path):
    trainer = disp_trainer(with_disp(), tmp_path, data=token_dataset(40, length=500))
    loader = trainer.get_train_dataloader()
    before = torch.get_rng_state()
    rows = rows_of(loader, {"input_ids"}, 0)
    assert torch.equal(torch.get_rng_state(), before)
    # Enough for 4096 tokens in batches of two rows.
    assert [tuple(batch["input_ids"].shape) for batch in rows] == [(2, 500)] * 5 and set(rows[0]) == {"input_ids"}
    assert torch.equal(rows[0]["input_ids"], rows_of(loader, {"input_ids"}, 0)[0]["input_ids"])
    assert not torch.equal(rows[0]["input_ids"], rows_of(loader, {"input_ids"}, 1)[0]["input_ids"])


def test_an_iterable_data_set_gives_its_first_rows(tmp_path):
    data = token_dataset(40)
    trainer = disp_trainer(with_disp(keep_ratio=0.6), tmp_path, data=data.to_iterable_dataset(), max_steps=2)
    rows = rows_of(trainer.get_train_dataloader(), {"input_ids"}, 0)
    assert rows[0]["input_ids"].tolist() == data["input_ids"][:2] and len(rows) == 20
    trainer.train()
    assert not network(trainer.model).awaits_start


def test_training_without_data_warns_once_and_an_explicit_start_is_an_error(caplog):
    disp_layer._report_missing_start.cache_clear()
    ids = token_batch()
    model = with_disp().train()
    with caplog.at_level(logging.WARNING):
        model(input_ids=ids, labels=ids).loss.backward()
        with_disp().train()(input_ids=ids, labels=ids)
    assert [record for record in caplog.records if "start_scores='none'" in record.message][1:] == []
    assert "DISP starts with all channels alike" in caplog.text
    with pytest.raises(ValueError, match="start_scores='flap' needs calibration_data, or DISPCallback"):
        with_disp(start_scores="flap").train()(input_ids=ids, labels=ids)
    caplog.clear()
    with_disp(start_scores="none").train()(input_ids=ids, labels=ids)
    assert "alike" not in caplog.text


def test_wrong_settings_are_refused_by_name():
    with pytest.raises(ValueError, match=r"DISPConfig.start_scores must be None, none or one of random, .*, got 'obd'"):
        DISPConfig(start_scores="obd")
    with pytest.raises(ValueError, match="calibration_data is not used with start_scores='none'"):
        DISPConfig(start_scores="none", calibration_data=batches())
    with pytest.raises(ValueError, match=r"DISPConfig.calibration_data must hold at least one batch"):
        with_disp(calibration_data=[])


def test_a_loaded_adapter_and_one_that_has_learned_do_not_start_again(tmp_path):
    model = with_disp(keep_ratio=0.6, calibration_data=batches())
    trainer = disp_trainer(model, tmp_path / "run", callback=False, max_steps=2)
    trainer.train()
    learned = disp_state(model)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path / "adapter", is_trainable=True)
    assert again.peft_config["default"].calibration_data is None
    for one in (model, again):
        assert not network(one).awaits_start
        assert_states_close(disp_state(one), learned, rtol=0, atol=0)


def test_a_second_adapter_starts_from_the_base_and_not_from_the_first():
    data = batches()
    alone = with_disp(keep_ratio=0.6, calibration_data=data).disp_masks()
    model = with_disp(keep_ratio=0.3, awake=True)
    model.add_adapter("second", DISPConfig(task_type="CAUSAL_LM", keep_ratio=0.6, calibration_data=data))
    model.set_adapter("second")
    for ours, theirs in zip(model.disp_masks(), alone, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_generator_of_data_serves_two_adapters_of_one_configuration():
    config = DISPConfig(task_type="CAUSAL_LM", keep_ratio=0.6, calibration_data=iter(batches()))
    model = get_peft_model(tiny("llama"), config)
    first = model.disp_masks()
    model.add_adapter("reference", config)
    model.set_adapter("reference")
    for ours, theirs in zip(model.disp_masks(), first, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def _share():
    rank = dist.get_rank()
    net = network(with_disp(keep_ratio=0.6, calibration_data=batches()[rank : rank + 1]))
    before = torch.cat(net.logits())
    share_start(net)
    return before, torch.cat(net.logits())


@pytest.mark.slow
def test_processes_that_saw_other_rows_start_as_the_first(tmp_path):
    (first, ours), (other, theirs) = in_processes(2, _share, tmp_path)
    assert not torch.equal(first, other)
    assert torch.equal(ours, first) and torch.equal(theirs, first)


def test_an_adapter_started_by_a_method_of_ones_own_loads_where_that_is_unknown(tmp_path):
    register_pruning_method("own", random_scores)
    try:
        with_disp(start_scores="own", calibration_data=batches()).save_pretrained(tmp_path)
    finally:
        del PRUNING_METHODS["own"]
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    assert again.peft_config["default"].start_scores == "own"
