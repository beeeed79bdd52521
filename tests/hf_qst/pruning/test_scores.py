"""Pruning by scores: the formulas, the budget, every architecture, methods of one's own, what is refused."""

import copy
import math

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from hf_qst.base_model.budget import BudgetError
from hf_qst.base_model.decoder_stack import find_decoder_stack
from hf_qst.calibration import CalibrationError
from hf_qst.disp import DISPConfig
from hf_qst.errors import UnsupportedArchitectureError
from hf_qst.pruning.branch import PrunedBranch
from hf_qst.pruning.by_scores import prune_model
from hf_qst.pruning.gradients import fisher_scores, taylor_scores
from hf_qst.pruning.layout import SELECTIONS, PruningLayout
from hf_qst.pruning.points import selection_points
from hf_qst.pruning.scores import (
    PRUNING_METHODS,
    PruningTask,
    flap_scores,
    magnitude_scores,
    register_pruning_method,
    wanda_scores,
)
from tests.architectures import CONFIGS, digest, tiny, token_batch

METHODS = tuple(PRUNING_METHODS)


def batches(count=3):
    return [{"input_ids": token_batch(4, 10, seed=s)} for s in range(count)]


def parameters(model):
    return sum({id(p): p.numel() for p in model.parameters()}.values())


def task(model, data=None):
    stack = find_decoder_stack(model)
    return PruningTask(model, stack, PruningLayout.of(stack), data)


def widths(model):
    """[layers, 5], read from the shapes of a pruned Llama's weights."""
    found = []
    for block in model.model.layers:
        inner = lambda module: module.module if isinstance(module, PrunedBranch) else module
        attention, mlp = inner(block.self_attn), inner(block.mlp)
        found.append(
            [
                attention.q_proj.in_features,
                attention.o_proj.out_features,
                mlp.gate_proj.in_features,
                mlp.down_proj.in_features,
                mlp.down_proj.out_features,
            ]
        )
    return found


def recorded(model, path, data):
    """Every row [n, d] that a module sees, in float64."""
    rows = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda m, a: rows.append(a[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in data:
            model(**batch)
    handle.remove()
    return torch.cat(rows).double()


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("method", METHODS)
def test_the_exported_parameters_are_those_of_disps_budget(method, allocation):
    # Wide enough for one channel to be less than 0.2 % of the weights.
    shape = {"hidden_size": 256, "intermediate_size": 512}
    dense = parameters(tiny("llama", **shape))
    learned = get_peft_model(tiny("llama", **shape), DISPConfig(keep_ratio=0.6, task_type="CAUSAL_LM"))
    report = learned.disp_report()
    budget = report.budget + report.other_parameters
    small = prune_model(
        tiny("llama", **shape), method, keep_ratio=0.6, calibration_data=batches(), allocation=allocation
    )
    assert parameters(small) < dense
    assert 0 <= budget - parameters(small) < 0.002 * budget
    assert torch.isfinite(small(input_ids=token_batch()).logits).all()


def test_uniform_allocation_keeps_the_same_part_everywhere_and_global_does_not():
    same = widths(prune_model(tiny("llama"), "flap", calibration_data=batches()))
    parts = [width / (128 if i == 3 else 64) for row in same for i, width in enumerate(row)]
    assert max(parts) - min(parts) <= 0.05
    competing = widths(prune_model(tiny("llama"), "flap", calibration_data=batches(), allocation="global"))
    assert len({row[3] for row in competing}) > 1


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_is_pruned_and_reloads(name, tmp_path):
    small = prune_model(tiny(name), "flap", keep_ratio=0.6, calibration_data=batches()).eval()
    ids = token_batch()
    before = small(input_ids=ids).logits
    assert torch.isfinite(before).all() and parameters(small) < parameters(tiny(name))
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(input_ids=ids).logits, before, rtol=0, atol=0)


@pytest.mark.parametrize(("hidden_size", "multiple"), [(512, 64), (448, 1)])
def test_widths_of_a_wide_model_are_multiples_of_64(hidden_size, multiple):
    base = tiny("llama", hidden_size=hidden_size, intermediate_size=704, num_attention_heads=8, head_dim=64)
    learned = get_peft_model(copy.deepcopy(base), DISPConfig(task_type="CAUSAL_LM", keep_ratio=0.7, init_weights=False))
    for model in (prune_model(base, "magnitude", keep_ratio=0.7), learned.merge_and_unload()):
        found = {width for row in widths(model) for width in row}
        assert math.gcd(*found) % multiple == 0 and (multiple > 1 or math.gcd(*found) < 64)
    assert DISPConfig.paper().width_multiple == 1


@pytest.mark.parametrize(("name", "multiple", "least"), [("llama", 16, 1), ("gpt2", 8, 24)])
def test_widths_are_multiples_and_not_below_the_least(name, multiple, least):
    model = prune_model(tiny(name), "magnitude", keep_ratio=0.7, width_multiple=multiple, min_width=least)
    branches = [module for module in model.modules() if isinstance(module, PrunedBranch)]
    sizes = [width for one in branches for width in (one.describe()["input_width"], one.describe()["output_width"])]
    sizes = [width for width in sizes if width is not None]
    assert sizes and all(width % multiple == 0 and width >= least for width in sizes)


@pytest.mark.parametrize("constraint", ["layer", "model"])
def test_constrained_selections_are_chosen_together(constraint):
    model = prune_model(tiny("llama"), "wanda", calibration_data=batches(), constraint=constraint)
    kept = [[row[0], row[1], row[2], row[4]] for row in widths(model)]
    assert all(len(set(row)) == 1 for row in kept)
    indices = [module.input_index for module in model.modules() if isinstance(module, PrunedBranch)]
    same = [torch.equal(index, indices[0]) for index in indices]
    assert all(same) if constraint == "model" else torch.equal(indices[0], indices[1]) and not all(same)


def test_only_the_selections_named_are_cut():
    assert all(
        row[:3] + row[4:] == [64] * 4 and row[3] < 128
        for row in widths(prune_model(tiny("llama"), "magnitude", keep_ratio=0.7, selections=["mlp_middle"]))
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_same_arguments_give_the_same_model(method):
    models = [prune_model(tiny("llama"), method, calibration_data=batches(), seed=3) for _ in range(2)]
    assert digest(models[0]) == digest(models[1])


def test_another_seed_gives_another_random_choice():
    assert digest(prune_model(tiny("llama"), "random", seed=1)) != digest(prune_model(tiny("llama"), "random", seed=2))


def reference(model, data, importance, middle_by_readers=False):
    """Scores of block 1 of a Llama or Phi, entry by entry from the recorded inputs."""
    at = {name: m for name, m in model.model.layers[1].named_modules() if isinstance(m, torch.nn.Linear)}
    entries = {}
    for path, module in at.items():
        rows = recorded(model, f"model.layers.1.{path}", data)
        entries[path] = importance(module.weight.T.double(), rows)
    return by_channel(entries, middle_by_readers)


def by_channel(entries, middle_by_readers=False):
    """The sums over the weights of each channel of a block, from an entry for every weight [d_in, d_out]."""
    reads = lambda *paths: sum(entries[path].sum(1) for path in paths)
    writes = lambda *paths: sum(entries[path].sum(0) for path in paths)
    gate = [path for path in entries if path in ("mlp.gate_proj", "mlp.up_proj", "mlp.fc1")]
    down = "mlp.down_proj" if "mlp.down_proj" in entries else "mlp.fc2"
    out = "self_attn.o_proj" if "self_attn.o_proj" in entries else "self_attn.dense"
    return {
        "attention_in": reads("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention_out": writes(out),
        "mlp_in": reads(*gate),
        "mlp_middle": reads(down) + (0 if middle_by_readers else writes(*gate)),
        "mlp_out": writes(down),
    }


FORMULAS = {
    "magnitude": (magnitude_scores, lambda w, x: w.square(), False),
    "wanda": (wanda_scores, lambda w, x: w.abs() * x.square().mean(0).sqrt()[:, None], False),
    "flap": (flap_scores, lambda w, x: w.square() * x.var(0, correction=0)[:, None], True),
}


@pytest.mark.parametrize("architecture", ["llama", "phi"])
@pytest.mark.parametrize("method", FORMULAS)
def test_scores_are_those_of_the_formula(method, architecture):
    model, data = tiny(architecture), batches()
    function, importance, by_readers = FORMULAS[method]
    found = function(task(model, data))[1]
    expected = reference(model, data, importance, by_readers)
    for name in SELECTIONS:
        wanted = expected[name].sqrt() if method == "magnitude" else expected[name]
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("architecture", ["llama", "phi"])
def test_taylor_scores_are_those_of_the_weights_own_gradients(architecture):
    model, data = tiny(architecture).double(), batches()
    # The mean over three batches of four rows with nine predictions each.
    for batch in data:
        (model(**batch, labels=batch["input_ids"]).loss / 3).backward()
    weights = {path: m.weight for path, m in model.model.layers[1].named_modules() if isinstance(m, torch.nn.Linear)}
    entries = {path: (w * w.grad).T.abs().detach() for path, w in weights.items()}
    expected = by_channel(entries)
    model.zero_grad(set_to_none=True)
    found = taylor_scores(task(model, data))[1]
    for name in SELECTIONS:
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-4, atol=1e-12)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("architecture", ["llama", "phi", "gpt2"])
def test_fisher_scores_are_those_of_gates_of_their_own_for_every_token(architecture):
    """Each token gets a gate of one; the gradient of the summed loss in it is taken by autograd."""
    model, data = tiny(architecture).double(), batches(2)
    stack = find_decoder_stack(model)
    sums = dict.fromkeys(SELECTIONS, 0.0)
    for batch in data:
        gates, handles = {}, []
        for point in selection_points(stack.blocks[1], stack):

            def gate(hidden, name=point.selection, gates=gates):
                gates[name] = torch.ones_like(hidden, requires_grad=True)
                return hidden * gates[name]

            handles.append(point.hook(gate))
        (model(**batch, labels=batch["input_ids"]).loss * 36).backward()
        for handle in handles:
            handle.remove()
        for name, one in gates.items():
            sums[name] = sums[name] + one.grad.square().flatten(0, 1).sum(0)
    model.zero_grad(set_to_none=True)
    found = fisher_scores(task(model, data))[1]
    for name in SELECTIONS:
        torch.testing.assert_close(found[name], sums[name] / (2 * 72), rtol=1e-3, atol=1e-15)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("scores", [wanda_scores, fisher_scores])
def test_padding_does_not_count(scores):
    model = tiny("llama")
    ids = token_batch(4, 10)
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    padded = scores(task(model, [{"input_ids": ids, "attention_mask": mask}]))
    plain = scores(task(model, [{"input_ids": ids[:, :6]}]))
    for name in SELECTIONS:
        torch.testing.assert_close(padded[0][name], plain[0][name], rtol=1e-4, atol=1e-6)


def test_what_removed_channels_gave_on_average_stays_in_the_biases():
    model, data = tiny("phi"), batches()
    for block in model.model.layers:
        torch.nn.init.normal_(block.mlp.fc1.bias)
    path = "model.layers.0.mlp.fc2"
    rows, layer = recorded(model, path, data), model.get_submodule(path)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    small = prune_model(model, "flap", keep_ratio=0.7, calibration_data=data, selections=["mlp_middle"])
    kept = small.model.layers[0].mlp.module.fc2
    stayed = (weight.T[:, None] == kept.weight.T).all(-1).any(1)
    assert 0 < stayed.sum() == kept.in_features < len(stayed)
    expected = bias.double() + rows.mean(0)[~stayed] @ weight.T[~stayed].double()
    torch.testing.assert_close(kept.bias.detach().double(), expected, rtol=1e-4, atol=1e-5)
    # The layer's mean output is the dense one's, which plain removal misses.
    torch.testing.assert_close(
        (rows[:, stayed] @ kept.weight.T.double() + kept.bias).mean(0),
        (rows @ weight.T.double() + bias).mean(0),
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_quantised_base_is_scored_by_its_dequantised_weights(tmp_path):
    from tests.architectures import in_nf4

    small = prune_model(in_nf4(tmp_path), "wanda", calibration_data=batches())
    assert torch.isfinite(small(input_ids=token_batch()).logits).all()


@pytest.fixture
def own_method():
    yield "first"
    PRUNING_METHODS.pop("first", None)


def test_a_method_of_ones_own_is_used_by_its_name(own_method):
    def first(given):
        return [
            {name: -torch.arange(given.layout.size(name), dtype=torch.float32) for name in SELECTIONS}
            for _ in given.stack.blocks
        ]

    register_pruning_method(own_method, first)
    model = prune_model(tiny("llama"), own_method)
    for module in model.modules():
        if isinstance(module, PrunedBranch):
            assert module.input_index.tolist() == list(range(len(module.input_index)))


@pytest.mark.parametrize("scores", [torch.full((64,), torch.nan), torch.zeros(3)])
def test_scores_that_cannot_be_used_are_refused_before_anything_changes(own_method, scores):
    register_pruning_method(own_method, lambda given: [dict.fromkeys(SELECTIONS, scores)] * given.layout.num_layers)
    model = tiny("llama")
    before = digest(model)
    with pytest.raises(ValueError, match=r"'first' must give finite scores \[64\] for 'attention_in' of block 0"):
        prune_model(model, own_method)
    assert digest(model) == before


def test_bad_arguments_are_refused_by_name():
    model = tiny("llama")
    before = digest(model)
    refused = {
        "method must be one of random, magnitude, wanda, flap, taylor, fisher, got 'obd'": {"method": "obd"},
        "allocation must be one of uniform, global, per_weight, got 'some'": {"allocation": "some", "method": "random"},
        "'flap' needs calibration_data": {},
        "keep_ratio must be in .0, 1., got 1.5": {"method": "random", "keep_ratio": 1.5},
        "selections must be a non-empty list": {"method": "random", "selections": ["heads"]},
    }
    for message, arguments in refused.items():
        with pytest.raises(ValueError, match=message):
            prune_model(model, **arguments)
    with pytest.raises(BudgetError, match=r"keep_ratio must be at least 0\.\d+"):
        prune_model(model, "random", keep_ratio=0.01, selections=["mlp_in"])
    with pytest.raises(CalibrationError, match="at least one batch"):
        prune_model(model, "wanda", calibration_data=[])
    with pytest.raises(ValueError, match="function of pruning method 'own' must be callable, got 3"):
        register_pruning_method("own", 3)
    assert digest(model) == before


def test_post_norm_and_pruned_models_are_refused():
    with pytest.raises(UnsupportedArchitectureError, match="post-norm"):
        prune_model(tiny("opt", do_layer_norm_before=False), "random")
    with pytest.raises(ValueError, match="pruned, compressed or wrapped before"):
        prune_model(prune_model(tiny("llama"), "random"), "random")
