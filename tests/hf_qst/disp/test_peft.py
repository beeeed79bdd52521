"""DISP as a PEFT method: configuration, saving, loading, several adapters, what is refused."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, T5Config
from trl import DPOConfig, DPOTrainer

from hf_qst import DISPConfig, MixedRankConfig
from hf_qst.errors import BudgetError, UnsupportedArchitectureError
from hf_qst.pruning import prune_blocks
from hf_qst.pruning.layout import SELECTIONS
from tests.architectures import CONFIGS, tiny, token_batch
from tests.pruned_models import network, random_masks, with_disp
from tests.toy_data import tokenizer

IDS = token_batch()
WEIGHTS = "adapter_model.safetensors"


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


# --- configuration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("keep_ratio", 0.0, r"in \(0, 1\]"),
        ("keep_ratio", 1.5, r"in \(0, 1\]"),
        ("keep_ratio", "half", r"in \(0, 1\]"),
        ("keep_ratio", float("nan"), r"in \(0, 1\]"),
        ("budget_scope", "layer", "one of targets, model"),
        ("regularization", -1.0, "a number of at least 0"),
        ("estimator", "ste", "one of reinmax"),
        ("hypernetwork", "lstm", "one of gru, linear, none"),
        ("hardening", "sample", "one of budget, threshold"),
        ("constraint", "same", "one of none, layer, model"),
        ("temperature", 0.5, "at least 1"),
        ("gumbel_temperature", 0, "above 0"),
        ("width_multiple", 0, "at least 1 or 'auto'"),
        ("width_multiple", "wide", "at least 1 or 'auto'"),
        ("min_width", 1.5, "at least 1"),
        ("seed", -1, "at least 0"),
        ("selections", [], "non-empty list out of attention_in"),
        ("selections", ["mlp_mid"], "non-empty list out of attention_in"),
    ],
)
def test_config_names_the_field_the_value_and_what_is_accepted(field, value, accepted):
    with pytest.raises(ValueError, match=rf"DISPConfig\.{field} must be .*{accepted}.*, got"):
        DISPConfig(**{field: value})


def test_config_round_trips(tmp_path):
    config = DISPConfig(
        keep_ratio=0.7, selections=["mlp_middle", "attention_in"], width_multiple=16, task_type="CAUSAL_LM"
    )
    assert config.selections == ["attention_in", "mlp_middle"]
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is DISPConfig and loaded.to_dict() == config.to_dict()


# --- saving and loading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_adapter_gives_the_same_choice(name, tmp_path):
    model = with_disp(name, awake=True)
    model.save_pretrained(tmp_path)
    assert all("disp_net" in key for key in load_file(tmp_path / WEIGHTS))
    loaded = PeftModel.from_pretrained(tiny(name), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    for left, right in zip(loaded.base_model.disp_masks(), model.base_model.disp_masks(), strict=True):
        assert all(torch.equal(left[key], right[key]) for key in SELECTIONS)


def test_hardened_choice_is_saved(tmp_path):
    model = with_disp(awake=True)
    model.base_model.harden()
    expected = logits(model)
    with torch.no_grad():
        for parameter in network(model).hypernetwork.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    assert network(loaded).is_hardened and torch.equal(logits(loaded), expected)


# --- as an adapter -----------------------------------------------------------------------------------------------------


def test_two_adapters_take_turns():
    model = with_disp(awake=True, keep_ratio=0.4)
    first = logits(model)
    model.add_adapter("second", DISPConfig(keep_ratio=0.8, seed=4, task_type="CAUSAL_LM"))
    model.set_adapter("second")
    second = logits(model)
    assert network(model).budget > 1.9 * model.base_model.disp_layer.networks["default"].budget
    model.set_adapter("default")
    assert torch.equal(logits(model), first) and not torch.equal(second, first)


def test_generation_uses_the_hardened_choice():
    model = with_disp(awake=True).train()
    settings = {"max_new_tokens": 8, "do_sample": False}
    tokens = model.eval().generate(input_ids=IDS, **settings)
    assert torch.equal(model.merge_and_unload().generate(IDS, **settings), tokens)


def test_report_counts_the_model_that_is_exported():
    model = with_disp(awake=True, keep_ratio=0.6)
    report = model.base_model.disp_report()
    small = model.merge_and_unload()
    assert 0.598 <= report.ratio <= 0.6
    # Llama has no biases, so nothing else is cut.
    assert sum(p.numel() for p in small.parameters()) == report.parameters + report.other_parameters


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_budget_of_the_whole_model(name):
    whole = sum(p.numel() for p in tiny(name).parameters())
    model = with_disp(name, keep_ratio=0.5, budget_scope="model")
    report = model.base_model.disp_report()
    assert 0.495 * whole <= report.parameters + report.other_parameters <= 0.5 * whole


def test_multiples_and_least_widths_reach_the_export():
    model = with_disp(awake=True, width_multiple=16, min_width=32)
    widths = model.base_model.disp_report().widths
    assert all(width % 16 == 0 and width >= 32 for row in widths for width in row)


def test_threshold_hardening_takes_the_logits_as_they_are():
    report = with_disp(awake=True, hardening="threshold").base_model.disp_report()
    assert report.ratio == report.threshold_ratio and abs(report.ratio - 0.5) > 0.05


def test_to_dense_has_the_bases_shapes():
    model = with_disp(awake=True)
    expected = logits(model)
    dense = model.base_model.to_dense()
    assert {n: p.shape for n, p in dense.named_parameters()} == {
        n: p.shape for n, p in tiny("llama").named_parameters()
    }
    torch.testing.assert_close(logits(dense), expected, atol=1e-5, rtol=1e-5)


# --- merging -----------------------------------------------------------------------------------------------------------


def two_adapters():
    model = with_disp(keep_ratio=0.6, init_weights=False)
    model.add_adapter("second", DISPConfig(keep_ratio=0.7, init_weights=False, task_type="CAUSAL_LM"))
    return model


def masks_of(model, name):
    return model.base_model.disp_layer.networks[name].masks()


def test_merged_in_place_it_keeps_its_choice_until_it_is_unmerged():
    model = with_disp(awake=True)
    expected, base = logits(model), logits(tiny("llama"))
    with torch.inference_mode():
        model.merge_adapter()
    with torch.no_grad():
        for parameter in network(model).hypernetwork.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(logits(model), expected)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embeddings).logits.sum().backward()
    assert torch.equal(logits(copy.deepcopy(model).merge_and_unload()), expected)
    model.unmerge_adapter()
    assert not torch.equal(logits(model), expected)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


def test_the_named_adapter_is_merged_whichever_is_active():
    model = two_adapters()
    model.set_adapter("second")
    expected = logits(model)
    model.set_adapter("default")
    assert torch.equal(logits(copy.deepcopy(model).merge_and_unload(adapter_names=["second"])), expected)
    with pytest.raises(ValueError, match="there is no DISP adapter 'third', only default, second"):
        model.merge_and_unload(adapter_names=["third"])


def test_two_merged_adapters_leave_what_both_keep():
    model = two_adapters()
    both = [
        {name: a[name] & b[name] for name in SELECTIONS}
        for a, b in zip(masks_of(model, "default"), masks_of(model, "second"), strict=True)
    ]
    expected = logits(prune_blocks(tiny("llama"), both))
    in_place = copy.deepcopy(model)
    in_place.merge_adapter(["default", "second"])
    torch.testing.assert_close(logits(in_place), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(model.merge_and_unload(adapter_names=["default", "second"])), expected)


def test_adapters_without_a_common_channel_are_refused_and_nothing_is_merged():
    model = with_disp(selections=["mlp_middle"], keep_ratio=0.5, hypernetwork="none", hardening="threshold")
    config = DISPConfig(selections=["mlp_middle"], hypernetwork="none", hardening="threshold", task_type="CAUSAL_LM")
    model.add_adapter("second", config)
    for sign, name in ((1, "default"), (-1, "second")):
        for parameter in model.base_model.disp_layer.networks[name].parameters():
            parameter.data.copy_(torch.where(torch.arange(len(parameter)) % 2 == 0, sign * 9.0, -sign * 9.0))
    expected = logits(model)
    with pytest.raises(
        ValueError, match="default, second cannot be merged: none of the channels 'mlp_middle' of block 0"
    ):
        model.merge_and_unload(adapter_names=["default", "second"])
    assert not model.base_model.disp_layer.merged and torch.equal(logits(model), expected)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_broken_adapters_are_not_merged(safe_merge):
    model = with_disp()
    next(network(model).hypernetwork.parameters()).data[0] = torch.inf
    with pytest.raises(ValueError, match="The adapter default seems to be broken"):
        model.merge_and_unload(safe_merge=safe_merge)


# --- copies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hardened", [False, True])
def test_a_reference_made_as_trl_makes_it_is_the_same_function(hardened, tmp_path):
    """TRL's preference trainers add an adapter with the same configuration and copy parameters by name."""
    model = with_disp(awake=True)
    if hardened:
        model.base_model.harden()
    # As if drawn by another version of the generator.
    network(model).hypernetwork.embeddings.data.add_(1)
    model.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=True)
    expected = logits(model)
    rows = {"prompt": ["t5 t6"] * 4, "chosen": ["t7 t8"] * 4, "rejected": ["t9 t10"] * 4}
    quiet = {"report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no"}
    arguments = DPOConfig(str(tmp_path / "out"), max_steps=1, gradient_checkpointing=False, **quiet)
    DPOTrainer(model, args=arguments, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer())
    with torch.no_grad():
        for parameter in model.base_model.disp_layer.networks["default"].hypernetwork.parameters():
            parameter.zero_()
    model.set_adapter("ref")
    assert torch.equal(logits(model), expected)
    assert model.base_model.disp_layer.networks["ref"].is_hardened is hardened


# --- dtypes and devices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_adapters_are_in_float32_or_on_request_in_the_bases_dtype(dtype, autocast, tmp_path):
    kind = {"autocast_adapter_dtype": autocast}
    model = get_peft_model(tiny("llama", dtype=dtype), DISPConfig(task_type="CAUSAL_LM"), **kind)
    model.add_adapter("added", DISPConfig(task_type="CAUSAL_LM"), **kind)
    model.save_pretrained(tmp_path)
    model.load_adapter(str(tmp_path), "loaded", **kind)
    expected = torch.float32 if autocast else dtype
    networks = model.base_model.disp_layer.networks
    for mode in (False, True):
        model.train(mode)
        assert {p.dtype for net in networks.values() for p in net.parameters()} == {expected}
    assert {net.hypernetwork.embeddings.dtype for net in networks.values()} == {torch.float32}
    masks = [masks_of(model, name) for name in ("default", "loaded")]
    assert all(torch.equal(a[key], b[key]) for a, b in zip(*masks, strict=True) for key in SELECTIONS)


# --- what is refused ---------------------------------------------------------------------------------------------------


def test_unreachable_budgets_name_the_smallest_ratio():
    model = tiny("llama")
    with pytest.raises(BudgetError, match=r"keep_ratio must be at least 0\.3"):
        get_peft_model(model, DISPConfig(keep_ratio=0.1, selections=["mlp_middle"]))
    with pytest.raises(BudgetError, match=r"of the model's .* parameters cannot be met"):
        get_peft_model(model, DISPConfig(keep_ratio=0.05, budget_scope="model"))
    assert torch.equal(logits(model), logits(tiny("llama")))


def test_architectures_that_cannot_be_pruned():
    small = {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 2, "d_kv": 16, "vocab_size": 96}
    t5 = AutoModelForSeq2SeqLM.from_config(T5Config(**small))
    with pytest.raises(UnsupportedArchitectureError, match="encoder-decoder"):
        get_peft_model(t5, DISPConfig())
    with pytest.raises(UnsupportedArchitectureError, match="post-norm"):
        with_disp(model=tiny("opt", do_layer_norm_before=False))


def test_bases_with_changed_shapes_are_refused():
    model = tiny("llama")
    small = prune_blocks(model, random_masks(model))
    with pytest.raises(ValueError, match="pruned, compressed or wrapped before"):
        with_disp(model=small)
    config = MixedRankConfig(keep_ratio=0.5, decomposition="plain", compensation="none", progress=False)
    low_rank = get_peft_model(tiny("llama"), config).merge_and_unload()
    with pytest.raises(ValueError, match="pruned, compressed or wrapped before"):
        with_disp(model=low_rank)
