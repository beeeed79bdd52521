"""Mixed rank behind PEFT's doors: ranks, budgets, saving, training with Trainer, merging, and every refusal."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

from hf_qst.errors import CheckpointError
from hf_qst.mixed_rank import (
    BudgetError,
    LowRankLinear,
    MixedRankConfig,
    NoDenseWeightsError,
    compress_model,
    rank_report,
)
from hf_qst.mixed_rank.model import MixedRankLayer
from tests.architectures import NF4, digest, in_nf4, tiny, token_batch

IDS = token_batch(seed=50)
SAME = {"layer_weight": "none"}


def batches(count=3):
    return [{"input_ids": token_batch(4, 12, seed=s)} for s in range(count)]


def config(**changes):
    return MixedRankConfig(**{"keep_ratio": 0.5, "calibration_data": batches(), "progress": False, **changes})


def compressed(name="llama", model=None, **changes):
    return get_peft_model(tiny(name) if model is None else model, config(**changes))


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def targets(model):
    return sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n)


@pytest.mark.parametrize("scope", ["targets", "model"])
@pytest.mark.parametrize("keep", [0.3, 0.4, 0.6, 0.8])
def test_budget_is_met_in_real_parameters(keep, scope):
    dense = tiny("llama", hidden_size=96, intermediate_size=192)
    small = compressed(model=tiny("llama", hidden_size=96, intermediate_size=192), keep_ratio=keep, budget_scope=scope)
    small = small.merge_and_unload()
    size = parameters(dense)
    wanted = keep * size if scope == "model" else size - (1 - keep) * targets(dense)
    base = size if scope == "model" else targets(dense)
    assert parameters(small) <= wanted
    assert wanted - parameters(small) <= 0.005 * keep * base
    # No tensor of a replaced weight's shape is left.
    for row in rank_report(small):
        assert row["parameters"] < row["shape"][0] * row["shape"][1] or row["rank"] is None


def test_infeasible_budget_names_the_smallest_and_that_one_works():
    before = digest(model := tiny("llama"))
    with pytest.raises(BudgetError, match=r"keep_ratio=0\.01 .* keep_ratio must be at least (0\.\d+)") as caught:
        compressed(model=model, keep_ratio=0.01)
    smallest = float(str(caught.value).rpartition(" ")[2])
    assert digest(model) == before
    assert 0.01 < smallest < 0.1
    assert all(r == 1 for r in compressed(keep_ratio=smallest).peft_config["default"].rank_pattern.values())
    with pytest.raises(BudgetError, match="of the model's"):
        compressed(keep_ratio=0.05, budget_scope="model")


@pytest.mark.parametrize(
    "selected, expected",
    [
        (["q_proj", "layers.1.mlp.down_proj"], 4),
        (r".*layers\.[02]\.mlp\..*", 6),
        ("all-linear", 21),
        (None, 21),
    ],
)
def test_targets_by_name_by_expression_and_all(selected, expected, recwarn):
    made = compressed(target_modules=selected, exclude_modules=["o_proj"], allocation={"allow_dense": False})
    names = made.peft_config["default"].rank_pattern
    assert len(names) == expected - 3 * (expected == 21)
    assert not any("o_proj" in name or "lm_head" in name for name in names)
    assert not [one for one in recwarn if "modules were excluded" in str(one.message)]


@pytest.mark.parametrize("multiple", [4, 8])
def test_ranks_are_multiples(multiple):
    assert {
        r % multiple
        for r in compressed(allocation={"rank_multiple": multiple}).peft_config["default"].rank_pattern.values()
    } == {0}


def test_given_ranks_are_kept_and_the_budget_is_shared():
    made = compressed(rank_pattern={"v_proj": 3, "layers.1.self_attn.v_proj": 5, "layers.0.mlp.up_proj": 0})
    found = made.peft_config["default"]
    assert [found.rank_pattern[f"model.layers.{i}.self_attn.v_proj"] for i in range(3)] == [3, 5, 3]
    assert "model.layers.0.mlp.up_proj" in found.results.dense_modules
    assert type(made.get_submodule("base_model.model.model.layers.0.mlp.up_proj")) is nn.Linear
    small = made.merge_and_unload()
    assert parameters(tiny("llama")) - parameters(small) >= 0.49 * targets(tiny("llama"))


def test_dense_layer_is_the_original_object():
    model = tiny("llama")
    # Half of the layers is easy to factor: their weights have rank 4.
    kept = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and ".mlp." in name:
                u, s, v = torch.linalg.svd(module.weight, full_matrices=False)
                module.weight.copy_(u[:, :4] * s[:4] @ v[:4])
            elif isinstance(module, nn.Linear):
                kept[name] = module
    made = compressed(model=model, keep_ratio=0.6, allocation={"min_rank_ratio": 0.0})
    dense = made.peft_config["default"].results.dense_modules
    assert dense
    for name in dense:
        assert made.base_model.model.get_submodule(name) is kept[name]
        assert not kept[name].weight.requires_grad


def test_config_of_the_caller_is_not_changed():
    mine = config()
    made = get_peft_model(tiny("llama"), mine)
    assert not mine.rank_pattern and mine.calibration_data is not None
    assert made.peft_config["default"].calibration_data is None
    other = get_peft_model(tiny("llama", seed=4), mine)
    assert other.peft_config["default"].rank_pattern != made.peft_config["default"].rank_pattern


def test_saved_configuration_is_json_without_data(tmp_path):
    compressed().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"].startswith("MIXED_RANK (")
    assert "calibration_data" not in saved
    assert saved["rank_pattern"] and all(isinstance(r, int) for r in saved["rank_pattern"].values())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(saved["rank_pattern"])


def test_model_card_speaks_of_this_method(tmp_path):
    model = compressed()
    for _ in range(2):
        model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.count("import hf_qst") == 1 and "a KeyError" in text
    assert "low-rank factors" in text and "side network" not in text and "merge_and_unload()" in text


LOAD = """
import sys, torch, transformers
import hf_qst, hf_qst.mixed_rank
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ids = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(model(input_ids=ids, use_cache=False).logits, sys.argv[3])
"""


def test_adapter_loads_in_a_new_process(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "base")
    model = compressed(model=AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    torch.save(IDS, tmp_path / "ids")
    arguments = [str(tmp_path / name) for name in ("adapter", "ids", "logits")]
    subprocess.run([sys.executable, "-c", LOAD, *arguments], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    torch.testing.assert_close(torch.load(tmp_path / "logits"), logits(model), atol=1e-6, rtol=0)


def test_merging_gives_the_same_function_in_a_plain_model():
    made = compressed("opt", compensation="none")
    expected = logits(made)
    small = made.merge_and_unload(safe_merge=True)
    assert torch.equal(logits(small), expected)
    assert not any(isinstance(m, MixedRankLayer) for m in small.modules())
    assert not hasattr(small, "peft_config")
    assert "base_layer" not in str(small)


def test_to_dense_is_the_same_function_in_the_old_shapes():
    base = tiny("opt")
    made = compressed("opt")
    expected = logits(made)
    dense = made.to_dense()
    torch.testing.assert_close(logits(dense), expected, atol=1e-5, rtol=1e-5)
    assert type(dense) is type(base)
    assert {k: v.shape for k, v in dense.state_dict().items()} == {k: v.shape for k, v in base.state_dict().items()}


@pytest.mark.parametrize("call", ["unload", "merge_adapter", "unmerge_adapter", "disable_adapter_layers"])
def test_what_needs_the_dense_weights_is_refused(call):
    model = compressed()
    expected = logits(model)
    with pytest.raises(NoDenseWeightsError, match="replaced the dense weights"):
        getattr(model, call)()
    assert torch.equal(logits(model), expected)
    with pytest.raises(NoDenseWeightsError, match="switched off"), model.disable_adapter():
        pass
    with pytest.raises(NoDenseWeightsError, match="deleted"):
        model.delete_adapter("default")
    assert torch.equal(logits(model), expected)


def test_one_adapter_only():
    model = compressed()
    expected = logits(model)
    with pytest.raises(ValueError, match="compressed by mixed rank once"):
        model.add_adapter("second", config())
    assert torch.equal(logits(model), expected)
    assert list(model.peft_config) == ["default"]


def test_adapters_of_another_method_are_refused():
    model = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"])).base_model.model
    with pytest.raises(ValueError, match="adapters of another method"):
        compressed(model=model)


def test_lora_trains_on_a_compressed_model():
    small = compressed().merge_and_unload()
    expected = logits(small)
    tuned = get_peft_model(small, LoraConfig(target_modules=["down", "up"], init_lora_weights=False))
    assert not torch.allclose(logits(tuned), expected, atol=1e-3)
    assert sum("lora_A" in n for n, _ in tuned.named_parameters()) == 2 * sum(
        isinstance(m, LowRankLinear) for m in small.modules()
    )


def arguments(directory, **changes):
    settings = {
        "max_steps": 8,
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 4,
        "report_to": [],
        "use_cpu": True,
    }
    return TrainingArguments(
        output_dir=str(directory), save_steps=4, logging_steps=1, disable_tqdm=True, seed=0, **{**settings, **changes}
    )


def dataset(count=64):
    ids = token_batch(count, 10, seed=3)
    ids[:, 5:] = ids[:, :5]
    return [{"input_ids": row, "labels": row} for row in ids]


def test_trainer_trains_the_factors_saves_and_resumes(tmp_path):
    model = compressed(keep_ratio=0.6, allocation=SAME)
    base = {n: p.detach().clone() for n, p in model.named_parameters() if "mixed_rank" not in n}
    trainer = Trainer(model, arguments(tmp_path), train_dataset=dataset())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-2:]) < sum(losses[:2])
    for name, parameter in model.named_parameters():
        if name in base:
            assert torch.equal(parameter, base[name])
    again = compressed(keep_ratio=0.6, allocation=SAME)
    Trainer(again, arguments(tmp_path), train_dataset=dataset()).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-4")
    )
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=1e-5)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path / "checkpoint-8")
    torch.testing.assert_close(logits(loaded), logits(model))


def test_modules_to_save_train_and_are_saved(tmp_path):
    model = compressed(modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("lm_head" in n for n in trained)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(0.1)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny("llama"), tmp_path)), logits(model))


def test_half_precision_stays_half():
    model = compressed(model=tiny("llama", dtype=torch.bfloat16))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    full = compressed()
    assert (logits(model).float() - logits(full)).norm() < 0.1 * logits(full).norm()


@pytest.mark.parametrize("packed", [False, True])
def test_nf4_base_is_dequantised_for_the_factors(tmp_path, packed):
    """Also after a forward pass, at which bitsandbytes changes the layout of 4-bit weights on some processors."""
    reference = logits(in_nf4(tmp_path / "twin"))
    model = in_nf4(tmp_path / "model")
    if packed:
        logits(model)
    ranks = dict.fromkeys(["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 64)
    ranks |= dict.fromkeys(["k_proj", "v_proj"], 32)
    made = compressed(model=model, rank_pattern=ranks, compensation="none")
    # The packed layout's own kernel computes in bfloat16.
    assert (logits(made) - reference).norm() < 0.03 * reference.norm()
    assert all(p.is_floating_point() for n, p in made.named_parameters() if "mixed_rank" in n)


def test_model_whose_weights_are_no_longer_quantised_does_not_say_that_they_are(tmp_path):
    """All layers of the blocks have factors in floating point, and the head was never in 4 bits."""
    ranks = dict.fromkeys(["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 8)
    ranks |= dict.fromkeys(["k_proj", "v_proj"], 8)
    small = compressed(model=in_nf4(tmp_path / "base"), rank_pattern=ranks, compensation="none").merge_and_unload()
    assert getattr(small.config, "quantization_config", None) is None
    small.save_pretrained(tmp_path / "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(logits(loaded), logits(small))


def test_smaller_model_reloads_in_four_bits(tmp_path):
    small = compress_model(tiny("llama"), config())
    small.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**NF4), device_map="cpu"
    )
    layer = next(m for m in loaded.modules() if isinstance(m, LowRankLinear))
    assert type(layer.down).__name__ == type(layer.up).__name__ == "Linear4bit"
    exact, quantised = logits(small), logits(loaded)
    assert 0 < (exact - quantised).norm() < 0.5 * exact.norm()


def test_without_data_the_plain_svd_is_used_with_one_warning(caplog):
    with caplog.at_level(logging.WARNING, logger="hf_qst.mixed_rank"):
        found = compressed(calibration_data=None)
    assert caplog.text.count("plain SVD") == 1
    plain = compressed(decomposition="plain")
    assert found.peft_config["default"].rank_pattern == plain.peft_config["default"].rank_pattern
    assert torch.equal(logits(found), logits(plain))


@pytest.mark.parametrize(
    "changes", [{"decomposition": "second_moment"}, {"decomposition": "diagonal"}, {"compensation": "lstsq"}]
)
def test_what_needs_data_refuses_to_go_without(changes):
    model = tiny("llama")
    before = str(model)
    with pytest.raises(ValueError, match=f"{next(iter(changes.values()))}.* needs calibration_data, got None"):
        compressed(model=model, calibration_data=None, **changes)
    assert str(model) == before


@pytest.mark.parametrize("metric", ["second_moment", "normalized", "representative", "diagonal", "plain"])
@pytest.mark.parametrize("allocator", ["hull", "gradual", "uniform"])
def test_every_metric_goes_with_every_allocator(metric, allocator):
    model = compressed(decomposition=metric, allocation=allocator, compensation="none", keep_ratio=0.7)
    found = model.peft_config["default"]
    assert set(found.results.statistics) == {*found.rank_pattern, *found.results.dense_modules}
    assert all(0 <= facts["relative_error"] < 1 for facts in found.results.statistics.values())
    assert torch.isfinite(logits(model)).all()


def test_memory_limit_changes_no_factor():
    whole = compressed(compensation="none")
    parts = compressed(compensation="none", memory_limit=128 * 128 * 8)
    assert torch.equal(logits(whole), logits(parts))


def test_few_rows_are_mentioned_once(caplog):
    with caplog.at_level(logging.WARNING, logger="hf_qst.mixed_rank"):
        compressed(calibration_data=batches(1))
    assert caplog.text.count("fewer rows than dimensions") == 1
    assert "at least 512 are recommended" in caplog.text


def edited(directory, change_config=None, change_tensors=None):
    path = directory / "adapter_config.json"
    saved = json.loads(path.read_text())
    if change_config:
        change_config(saved)
        del saved["manifest"]["settings"]  # as version 0.1 wrote it, where the setting itself is not checked
    path.write_text(json.dumps(saved))
    if change_tensors:
        tensors = load_file(directory / "adapter_model.safetensors")
        change_tensors(tensors)
        save_file(tensors, directory / "adapter_model.safetensors")


NAME = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{NAME}.mixed_rank_factors.down.weight"


@pytest.mark.parametrize(
    "change, tensors, message",
    [
        (lambda c: c["rank_pattern"].update({NAME: 3}), None, f"factors of '{NAME}' have rank .* rank_pattern says 3"),
        (lambda c: c["rank_pattern"].update({NAME: 65}), None, "rank 65, but it is a linear layer of"),
        (lambda c: c["rank_pattern"].update({"model.nothing": 3}), None, "'model.nothing', which LlamaForCausalLM"),
        (lambda c: c["rank_pattern"].pop(NAME), None, "rank_pattern says 0"),
        (None, lambda t: t.pop(KEY), "is missing"),
        (None, lambda t: t[KEY].view(-1)[:1].fill_(torch.nan), "NaN"),
        (None, lambda t: t[KEY].view(-1)[:1].add_(1.0), "checksum"),
        (None, lambda t: t.update({KEY + "2": torch.ones(2)}), "not in its manifest"),
    ],
)
def test_damaged_checkpoints_are_named(tmp_path, change, tensors, message):
    compressed(allocation={"allow_dense": False}).save_pretrained(tmp_path)
    edited(tmp_path, change, tensors)
    with pytest.raises(CheckpointError, match=message):
        PeftModel.from_pretrained(tiny("llama"), tmp_path)


def test_factors_that_were_never_loaded_show(tmp_path):
    compressed().save_pretrained(tmp_path)
    assert logits(get_peft_model(tiny("llama"), PeftConfig.from_pretrained(tmp_path))).isnan().all()


def test_auto_class_of_peft_loads_it(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "base")
    model = compressed(model=AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))


def test_description_rebuilds_an_empty_layer():
    dense = nn.Linear(12, 20)
    layer = LowRankLinear(12, 20, 5, dtype=torch.float32)
    described = json.loads(json.dumps(layer.describe()))
    again = LowRankLinear.from_description(dense, described)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in layer.state_dict().items()}
    with torch.device("meta"):
        empty = LowRankLinear.from_description(nn.Linear(12, 20), described)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    for change, message in (
        ({"kind": "other"}, "kind 'low_rank', got 'other'"),
        ({"rank": 13}, "from 1 to 12, got 13"),
        ({"rank": "3"}, "from 1 to 12, got '3'"),
        ({"in_features": 13}, r"described as \[13, 20\] cannot replace one of \[12, 20\]"),
    ):
        with pytest.raises(ValueError, match=message):
            LowRankLinear.from_description(dense, {**described, **change})


def test_making_a_layer_draws_no_random_numbers():
    state = torch.get_rng_state()
    layer = LowRankLinear.from_factors(torch.randn(4, 2, generator=torch.Generator()), torch.ones(2, 6), torch.ones(6))
    assert torch.equal(torch.get_rng_state(), state)
    assert layer(torch.ones(3, 5, 4)).shape == (3, 5, 6)


def test_transformers_own_adapter_methods(tmp_path):
    model = tiny("llama")
    model.add_adapter(config())
    expected = logits(model)
    model.save_pretrained(tmp_path)
    other = tiny("llama")
    other.load_adapter(tmp_path)
    assert torch.equal(logits(other), expected)
