"""Every type in the table with every method, on a tiny random model; the types that most people use run by default."""

import inspect
import json
import math
import re
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import hf_qst
from hf_qst import DISPConfig, MixedRankConfig, to_dense
from hf_qst.base_model.decoder_stack import ARCHITECTURES, WRAPPERS, find_decoder_stack
from hf_qst.base_model.packed_weights import forbid_packing
from hf_qst.base_model.unsupported_types import UNSUPPORTED
from hf_qst.errors import BudgetError, ReshapedModelError, UnsupportedArchitectureError
from hf_qst.qst.layer import _BlockHook
from hf_qst.supported import PAGE, page
from hf_qst.tuner.running_forward import RunningForward
from tests.architectures import NF4, side_config, token_batch, wake
from tests.popular_lines import POPULAR
from tests.pruned_models import network
from tests.tiny_decoders import tiny_decoder
from tests.tiny_wrappers import IMAGE, WRAPPED, image_batch, tiny_wrapper

RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "architecture_matrix.json"  # of tests/record_matrix.py
# Language models that are only part of a model of text and images.
_INSIDE = {"emu3_text_model", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text"}
# In a cache, the base itself counts padding among the tokens of a compressed window.
NOT_PADDED = {"deepseek_v4"}
NAMES = sorted({*ARCHITECTURES, *WRAPPERS} - _INSIDE)
EACH = [pytest.param(n, marks=() if n in POPULAR else pytest.mark.all_types) for n in NAMES]
each = pytest.mark.parametrize("name", EACH)
# Heads of several layers, in which bitsandbytes has no gradient on a CPU; a router whose weight is read past its layer.
NOT_IN_4_BITS = ["lm_head", "cls", "generator_predictions", "head", "router", "classifier"]
NEW = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "suppress_tokens": [2, IMAGE, *range(90, 95)]}


def make(name):
    if name == "gemma3n":  # whose vision tower is one of timm's
        pytest.importorskip("timm")
    return tiny_wrapper(name) if name in WRAPPED else tiny_decoder(name)


def batch(name, model) -> dict[str, torch.Tensor]:
    """Left-padded in the first row, with images if the model takes them."""
    if name not in WRAPPED:
        ids = token_batch(2, 12)
        ids[0, :3] = 3 if name in NOT_PADDED else 0
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}
    known = inspect.signature(type(model).forward).parameters
    return {key: value for key, value in image_batch(name).items() if key in known}


@torch.no_grad()
def logits(model, inputs) -> torch.Tensor:
    return model.eval()(**inputs, use_cache=False).logits


def labels_of(inputs) -> torch.Tensor:
    return inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)


def saved_and_loaded(name, model, folder):
    model.save_pretrained(folder)
    auto = AutoModelForImageTextToText if name in WRAPPED else AutoModelForCausalLM
    return auto.from_pretrained(folder).eval()


def assert_close(got, expected):
    torch.testing.assert_close(got, expected, atol=1e-4 * max(1.0, expected.abs().max().item()), rtol=1e-4)


def same(name, got, expected) -> bool:
    """Whether two outputs are equal, but for the last bit of convolutions in timm's towers, which depends on addresses."""
    return torch.allclose(got, expected, rtol=0, atol=1e-5) if name == "gemma3n" else torch.equal(got, expected)


def assert_loaded_again(model, again, inputs):
    """The same tensors; a product of loaded ones may round otherwise, as their memory is aligned otherwise."""
    saved, loaded = model.state_dict(), again.state_dict()
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[key], loaded[key]) for key in saved)
    assert_close(logits(again, inputs), logits(model, inputs))


def test_every_type_is_here():
    assert set(WRAPPED) == set(WRAPPERS)
    assert set(POPULAR) <= set(NAMES)
    assert {"qst", "disp", "mixed_rank"} == set(hf_qst.supported_models()["llama"])


def test_every_type_was_run_and_its_record_is_current():
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))["types"]
    assert recorded.keys() == {*NAMES}
    said = hf_qst.supported_models()
    for kind, row in recorded.items():
        for method, verdict in said[kind].items():
            refused = verdict == "as its language model" and row[method].startswith("no: ")
            assert refused or row[method] == verdict, kind


def test_the_types_without_a_row_are_the_other_language_models():
    known = {*ARCHITECTURES, *WRAPPERS}
    assert not known & {*UNSUPPORTED}
    if transformers.__version__.startswith("5.23."):
        assert {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - known == {*UNSUPPORTED}


def test_a_type_without_a_row_is_refused_with_its_reason(monkeypatch):
    model = tiny_decoder("llama")
    monkeypatch.setattr(type(model.config), "model_type", "rwkv")
    with pytest.raises(UnsupportedArchitectureError, match=re.escape(UNSUPPORTED["rwkv"])):
        find_decoder_stack(model)


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m hf_qst.supported"


@each
def test_side_tuning_starts_at_the_base_and_learns_from_its_loss(name):
    base = make(name)
    inputs = batch(name, base)
    before = logits(base, inputs)
    model = get_peft_model(base, side_config())
    assert same(name, logits(model, inputs), before)
    wake(model)
    assert not torch.equal(logits(model, inputs), before)

    inputs["labels"] = labels_of(inputs)
    with torch.no_grad():
        own = model.eval()(**inputs, use_cache=False).loss
    model.train()
    for module in model.modules():
        if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)):
            module.eval()  # of a vision tower, which would see the batch otherwise
    loss = model(**inputs).loss
    torch.testing.assert_close(loss.detach(), own, atol=1e-6, rtol=2e-5)
    loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    start = {n: p.detach().clone() for n, p in trained.items()}
    torch.optim.SGD(trained.values(), lr=10.0).step()
    still = {n for n, p in trained.items() if torch.equal(p, start[n])}
    spec = find_decoder_stack(base).spec
    if spec.qkv_bias and not spec.rotary_dim and not spec.qk_norm:
        # Without rotation or norm a bias of the keys adds the same to all scores of a query: its gradient is zero.
        still -= {n for n in still if n.endswith("k_proj.bias")}
    assert not still
    assert [n for n, p in model.named_parameters() if p.grad is not None and n not in trained] == []


def in_layout(tables, spec) -> bool:
    """Whether rotary tables hold a head's frequencies as the row says."""
    if spec.rotary == "complex":
        return torch.is_complex(tables)
    table = tables[0]
    if spec.rotary == "half":
        return table.shape[-1] == spec.rotary_dim // 2
    pairs = table.chunk(2, dim=-1) if spec.rotary == "halved" else (table[..., ::2], table[..., 1::2])
    return torch.equal(*pairs) and not torch.equal(table[..., :1].expand_as(table), table)


@each
def test_rotary_tables_are_laid_out_as_the_row_says(name):
    model = make(name)
    stack, given = find_decoder_stack(model), {}

    class Recorder:
        tail = None

        def reads(self, index):
            return True

        def record(self, index, entering, leaving, context):
            assert entering.shape == leaving.shape
            assert entering.shape[-1] == stack.spec.hidden_size
            given[index] = context.position_embeddings

    tape = RunningForward()
    for i, block in enumerate(stack.blocks):
        block.register_forward_hook(_BlockHook(i, block, tape, stack), with_kwargs=True)
    with tape.using(Recorder()):
        logits(model, batch(name, model))
    tables = [given[source] for source in set(stack.attention_sources()) if given[source] is not None]
    assert bool(tables) == bool(stack.spec.rotary_dim)
    assert all(in_layout(table, stack.spec) for table in tables)


@each
def test_side_tuned_generation_with_and_without_a_cache_agrees(name, tmp_path):
    model = wake(get_peft_model(make(name), side_config())).eval()
    inputs = batch(name, model.get_base_model())
    cached, uncached = (model.generate(**inputs, use_cache=use, **NEW) for use in (True, False))
    assert torch.equal(cached, uncached)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make(name), tmp_path)
    assert same(name, logits(again, inputs), logits(model, inputs))


@each
def test_side_tuning_of_a_base_in_nf4(name, tmp_path):
    model = make(name)
    head = next((n for n, module in model.named_modules() if module is model.get_output_embeddings()), "lm_head")
    model.save_pretrained(tmp_path)
    auto = AutoModelForImageTextToText if name in WRAPPED else AutoModelForCausalLM
    settings = BitsAndBytesConfig(**NF4, llm_int8_skip_modules=[*NOT_IN_4_BITS, head])
    base = auto.from_pretrained(tmp_path, quantization_config=settings, device_map={"": "cpu"}).eval()
    forbid_packing(base)  # which fails for such widths; the base is run by itself
    inputs = batch(name, base)
    before = logits(base, inputs)
    model = get_peft_model(base, side_config())
    assert same(name, logits(model, inputs), before)
    loss = wake(model).train()(**inputs, labels=labels_of(inputs)).loss
    loss.backward()
    assert math.isfinite(loss.item())
    assert [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())] == []


@each
def test_pruned_model_is_what_training_saw_and_keeps_what_was_asked_for(name, tmp_path, record_property):
    base = make(name)
    stack = find_decoder_stack(base)
    if stack.architecture.pruning_refused or not stack.spec.pre_norm:
        with pytest.raises(UnsupportedArchitectureError, match=r"cannot be pruned|post-norm"):
            get_peft_model(base, DISPConfig(keep_ratio=0.5))
        record_property("refused", stack.architecture.pruning_refused or "its norms follow the additions")
        return
    full = sum(p.numel() for p in stack.blocks.parameters())
    keep_ratio = 0.5
    try:
        model = get_peft_model(base, DISPConfig(keep_ratio=keep_ratio))
    except BudgetError as error:
        assert stack.architecture.unpruned  # what stays is more than that, and the row says what it is
        keep_ratio = (1 + float(re.search(r"at least ([\d.]+)", str(error))[1])) / 2
        model = get_peft_model(base, DISPConfig(keep_ratio=keep_ratio))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in network(model).hypernetwork.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    inputs = batch(name, base)
    model.train()(**inputs, labels=labels_of(inputs)).loss.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())] == []
    masked = logits(model, inputs)
    small = model.merge_and_unload()
    cut = logits(small, inputs)
    assert_close(cut, masked)
    kept = sum(p.numel() for p in find_decoder_stack(small).blocks.parameters())
    assert keep_ratio - 0.002 < kept / full <= keep_ratio
    assert_loaded_again(small, saved_and_loaded(name, small, tmp_path), inputs)
    assert_close(logits(to_dense(small), inputs), cut)


@each
def test_compressed_model_is_saved_and_loaded(name, tmp_path):
    base = make(name)
    inputs = batch(name, base)
    settings = {"keep_ratio": 0.8, "calibration_data": [inputs], "progress": False}
    if name == "jetmoe":  # most of whose blocks are experts in a form of their own
        with pytest.raises(BudgetError, match="are out of reach"):
            get_peft_model(make(name), MixedRankConfig(**settings))
        settings["exclude_modules"] = "lm_head"
    model = get_peft_model(base, MixedRankConfig(**settings))
    compressed = logits(model, inputs)
    small = model.merge_and_unload()
    assert_close(logits(small, inputs), compressed)
    assert_loaded_again(small, saved_and_loaded(name, small, tmp_path), inputs)
    if name == "falcon":  # whose linear layers are of a class of their own, which a product of factors does not know
        with pytest.raises(ReshapedModelError, match="FalconLinear"):
            to_dense(small)
        return
    assert_close(logits(to_dense(small), inputs), compressed)


def test_a_registered_type_is_found(monkeypatch):
    model = tiny_decoder("llama")
    monkeypatch.setattr(type(model.config), "model_type", "llama_of_tomorrow")
    with pytest.raises(UnsupportedArchitectureError, match=r"self_attn \(LlamaAttention\).*register_architecture\("):
        find_decoder_stack(model)
    monkeypatch.setattr("hf_qst.base_model.decoder_stack.ARCHITECTURES", {**ARCHITECTURES})
    hf_qst.register_architecture("llama_of_tomorrow", "llama")
    assert len(find_decoder_stack(model).blocks) == 4


@pytest.mark.parametrize("row, error", [("nobody", ValueError), (3, TypeError)])
def test_only_a_row_is_registered(row, error):
    with pytest.raises(error, match="register_architecture: row"):
        hf_qst.register_architecture("new", row)
