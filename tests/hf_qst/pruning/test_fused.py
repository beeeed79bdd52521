"""Pruned blocks with their kernels against the same blocks without: in Triton's interpreter, and on a GPU where one is."""

import copy
import importlib.util
import threading

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer

from benchmarks.common.measure import write_json
from hf_qst import to_dense
from hf_qst.base_model.decoder_stack import find_decoder_stack
from hf_qst.pruning import fused, prune_blocks, use_kernels
from hf_qst.reshaped_models import register_kind, reshape_model
from hf_qst_kernels import break_even, linear_index_add, use_backend
from tests.architectures import tiny
from tests.hf_qst.pruning.fused_blocks import FUSED, IDS, SMALL, Launches, furthest, logits, pruned, sites
from tests.interpreter import interpreted
from tests.pruned_models import random_masks

NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def results():
    return interpreted("tests/hf_qst/pruning/fused_interpreted.py")


@NEEDS_TRITON
@pytest.mark.parametrize("name", FUSED)
def test_whole_model_computes_the_same(results, name):
    assert results[f"{name} logits"] < 1e-5 and results[f"{name} hidden states"] < 1e-5
    launched, expected = results[f"{name} launches"]
    assert launched == expected == [6, 5]
    assert results[f"{name} inputs of blocks unchanged"] == [True] * 3
    assert results[f"{name} generated tokens are equal"] == [True, True]


@NEEDS_TRITON
def test_each_kernel_runs_without_the_other(results):
    error, launched, (selections, additions) = results["without norm_index_select"]
    assert error < 1e-5 and launched == [0, additions]
    error, launched, _ = results["without linear_index_add"]
    assert error < 1e-5 and launched == [selections, 0]


@NEEDS_TRITON
@pytest.mark.parametrize(
    "condition",
    [
        "reloaded",
        "NF4",
        "hook on the norm",
        "hook on the branch",
        "hook on the attention",
        "hook on the projection",
        "hook on the reader",
        "hook on all modules",
        "gradients",
        "training",
        "autocast",
        "inference mode",
        "forward of its own",
        "weights moved by accelerate",
        "attention weights",
        "MLP compiled",
        "projection compiled",
        "vmap",
        "LoRA",
    ],
)
def test_kernels_run_where_no_hook_or_transform_would_notice(results, condition):
    """And the results, with what hooks see, are those of the blocks without them."""
    error, launched, expected = results[condition]
    assert error < 1e-5 and launched == expected


@NEEDS_TRITON
def test_half_precision_differs_by_its_rounding(results):
    error, launched, expected = results["bfloat16"]
    assert 0 < error < 4 * 2**-7 and launched == expected == [2, 2]


@NEEDS_TRITON
def test_error_inside_a_branch_leaves_its_projection_whole(results):
    assert max(results["projection after an error"]) < 1e-5


@pytest.mark.parametrize("name", FUSED)
def test_cpu_runs_no_kernel_and_gives_the_same_bits(name, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("an op ran")

    monkeypatch.setattr("hf_qst_kernels.norm_index_select", never)
    monkeypatch.setattr("hf_qst_kernels.linear_index_add", never)
    model = pruned(name)
    ours = logits(model)
    for block in model.model.layers:
        assert isinstance(block, block.plain_class) and type(block) is not block.plain_class
        block.__class__ = block.plain_class
    assert torch.equal(ours, logits(model))
    assert not any(isinstance(module, fused.DeferrableLinear) for module in model.modules())


def test_rule_of_dispatch_is_asked():
    model = pruned()
    with use_backend("triton"), pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        logits(model)


@pytest.mark.parametrize("inplace", [False, True])
def test_naive_addition_runs_under_autocast(inplace):
    x, weight, bias = torch.randn(3, 8), torch.randn(5, 8), torch.randn(5).bfloat16()
    index, residual = torch.arange(5), torch.randn(3, 9)
    found = []
    for backend in ("torch", "naive"):
        with torch.autocast("cpu", torch.bfloat16), use_backend(backend):
            found.append(linear_index_add(x, weight, bias, index, residual.clone(), inplace))
    assert found[0].dtype == found[1].dtype == torch.float32
    assert furthest(*found) < 0.1


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "opt", "gpt2", "phi", "gpt_neox"])
def test_blocks_of_another_form_stay_as_they_are(name):
    model = tiny(name)
    blocks = [type(block) for block in find_decoder_stack(model).blocks]
    prune_blocks(model, random_masks(model))
    with pytest.raises(ValueError, match=r"use_kernels takes a pruned model with blocks of Llama.*got Reshaped"):
        use_kernels(model)
    assert [type(block) for block in find_decoder_stack(model).blocks] == blocks


def test_names_of_tensors_and_classes_stay(tmp_path):
    model = pruned("llama")
    block = model.model.layers[0]
    names = list(model.state_dict())
    assert type(block).__name__ in model._no_split_modules and repr(block).startswith("LlamaDecoderLayer(")
    for copied in (copy.deepcopy(model), whole_file(model, tmp_path)):
        assert type(copied.model.layers[0]) is type(block)
        assert list(copied.state_dict()) == names
        assert torch.equal(logits(copied), logits(model))
    block.__class__ = block.plain_class
    assert list(model.state_dict()) == names
    assert "DeferrableLinear" not in repr(fused.DeferrableLinear(2, 3))


def whole_file(model, folder):
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


def test_dense_model_has_its_blocks_back():
    model = pruned("qwen3")
    twin = logits(model)
    with torch.no_grad():
        projection = model.model.layers[0].self_attn.module.o_proj
        fused._without(projection, lambda: projection(torch.zeros(1, projection.in_features)))
    assert type(projection) is fused.DeferrableLinear
    dense = to_dense(model)
    assert not any(type(module).__module__.startswith("hf_qst") for module in dense.modules())
    assert furthest(logits(dense), twin) < 1e-5


def test_gradient_checkpointing_is_that_of_the_plain_block():
    model = pruned("llama")
    model.gradient_checkpointing_enable({"use_reentrant": False})

    def gradients():
        model.train().zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    ours = gradients()
    for block in model.model.layers:
        block.__class__ = block.plain_class
    assert all(map(torch.equal, ours, gradients()))


def test_compiles_into_one_graph_as_before():
    block = pruned("llama").model.layers[0]
    torch._dynamo.reset()
    hidden = torch.randn(1, 4, 32)
    rotary = torch.randn(2, 1, 4, 16).unbind()
    with torch.no_grad():
        compiled = torch.compile(block, fullgraph=True, backend="eager")
        assert torch.equal(compiled(hidden, position_embeddings=rotary), block(hidden, position_embeddings=rotary))


def test_projection_is_deferred_in_one_thread_only():
    layer, x, products = nn.Linear(3, 2), torch.randn(4, 3), []
    expected = layer(x)

    def run():
        thread = threading.Thread(target=lambda: products.append(layer(x)))
        thread.start()
        thread.join()
        return layer(x)

    output, deferred = fused._without(layer, run)
    assert output is x and deferred
    assert torch.equal(products[0], expected) and torch.equal(layer(x), expected)
    assert copy.deepcopy(layer)(x).equal(expected)


def test_projection_that_is_not_the_last_layer_is_an_error():
    layer, x = nn.Linear(3, 3), torch.randn(4, 3)
    with pytest.raises(
        RuntimeError, match=r"does not return what its last linear layer.*use_kernels\(model, enabled=False\)"
    ):
        fused._without(layer, lambda: layer(x) + 1)
    assert not torch.equal(layer(x), x)


@pytest.mark.parametrize("classifier", [False, True])
def test_kernels_are_attached_by_a_call_and_detached_by_another(classifier, tmp_path):
    """Without a GPU nothing else attaches them, neither pruning nor loading."""
    model = tiny("mistral", classifier=classifier)
    prune_blocks(model, random_masks(model)).save_pretrained(tmp_path)
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    again = auto.from_pretrained(tmp_path)
    for pruned_model in (model, again):
        assert {type(block) for block in pruned_model.model.layers} == {MistralDecoderLayer}
        for _ in range(2):
            assert use_kernels(pruned_model) is pruned_model
            assert {type(block).__module__ for block in pruned_model.model.layers} == {fused.__name__}
            assert {type(block).plain_class for block in pruned_model.model.layers} == {MistralDecoderLayer}
    assert {type(block).__module__ for block in to_dense(again).model.layers} == {MistralDecoderLayer.__module__}
    again.model.layers[0].mlp.module.down_proj.__class__ = fused.DeferrableLinear
    for _ in range(2):
        use_kernels(again, enabled=False)
        assert {type(block) for block in again.model.layers} == {MistralDecoderLayer}
        assert not any(type(module).__module__ == fused.__name__ for module in again.modules())


def test_model_that_was_not_pruned_has_no_use_for_kernels():
    with pytest.raises(ValueError, match=r"use_kernels takes a pruned model.*got LlamaForCausalLM"):
        use_kernels(tiny("llama"))


def test_kind_is_finished_with_all_modules_in_place():
    seen = []

    def finish(base):
        seen.append([type(block.mlp.up_proj).__name__ for block in base.layers])

    register_kind("toy_finished", lambda dense, description: Finished(dense.in_features, dense.out_features), finish)
    model = tiny("llama")
    for block in model.model.layers[:2]:
        block.mlp.up_proj = Finished(64, 128)
    reshape_model(model)
    assert seen == [["Finished", "Finished", "Linear"]] * 2  # once for the twin it is checked against
    seen.clear()
    type(model)(model.config)
    assert seen == [["Finished", "Finished", "Linear"]]


class Finished(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)

    def forward(self, x):
        return self.linear(x)

    def describe(self):
        return {"kind": "toy_finished"}


@pytest.mark.gpu
@NEEDS_CUDA
def test_kernels_are_attached_where_this_gpu_has_a_table(tmp_path, monkeypatch):
    def attached(model):
        return {isinstance(block, fused._Fused) for block in model.model.layers}

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(break_even, "SHIPPED", tmp_path / "shipped")
    models = [tiny("qwen3", **SMALL) for _ in range(2)]
    masks = random_masks(models[0])
    assert attached(prune_blocks(models[0].cuda(), masks)) == {False}
    chip = break_even.chip_of(torch.cuda.get_device_name())
    table = {"format": break_even.FORMAT, "chip": chip, "decisions": {}}
    write_json(break_even.user_folder() / f"{chip}.json", {**table, "decisions": {"norm_index_select": []}})
    break_even._tables.cache_clear()
    models[0].save_pretrained(tmp_path / "model")
    assert attached(AutoModelForCausalLM.from_pretrained(tmp_path / "model")) == {False}
    assert attached(AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map="cuda")) == {True}
    assert attached(prune_blocks(models[1].cuda(), masks)) == {True}
    break_even._tables.cache_clear()


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("name", FUSED)
def test_whole_model_on_cuda(name, monkeypatch):
    model = pruned(name, device="cuda", dtype=torch.bfloat16, hidden_size=256, intermediate_size=512)
    launches = Launches(monkeypatch.setattr)
    with use_backend("torch"):
        twin = logits(model)
    with use_backend("triton"):
        ours = logits(model)
        assert launches.look() == sites(model)
        assert torch.equal(ours, logits(model))
    assert furthest(ours, twin) < 8 * 2**-7 * twin.abs().max().item()


@pytest.mark.gpu
@NEEDS_CUDA
def test_decoding_step_of_a_block_in_a_cuda_graph(monkeypatch):
    model = pruned("qwen2", device="cuda", dtype=torch.bfloat16, hidden_size=256, intermediate_size=512)
    block = model.model.layers[0]
    hidden = torch.randn(1, 1, 256, device="cuda", dtype=torch.bfloat16)
    rotary = model.model.rotary_emb(hidden, torch.zeros(1, 1, dtype=torch.long, device="cuda"))
    launches = Launches(monkeypatch.setattr)
    with use_backend("triton"), torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                block(hidden, position_embeddings=rotary)
        torch.cuda.current_stream().wait_stream(stream)
        launches.look()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = block(hidden, position_embeddings=rotary)
        assert launches.look() == (2, 2)
        for _ in range(2):
            hidden.copy_(torch.randn_like(hidden))
            before = hidden.clone()
            graph.replay()
            assert torch.equal(hidden, before)
            assert torch.equal(captured, block(hidden, position_embeddings=rotary))
