"""Physically pruned models against the masked ones, and what can be done with them afterwards."""

import copy
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_qst import MixedRankConfig, QSTConfig, to_dense
from hf_qst.base_model.decoder_stack import find_decoder_stack
from hf_qst.disp.layer import DISPLayer
from hf_qst.errors import UnsupportedArchitectureError
from hf_qst.pruning import prune_blocks
from hf_qst.pruning.layout import SELECTIONS, PruningLayout
from tests.architectures import CONFIGS, NF4, in_nf4, tiny, token_batch
from tests.pruned_models import random_masks, with_disp

IDS = token_batch()


@torch.no_grad()
def logits(model, ids=IDS, **settings):
    return model.eval()(input_ids=ids, **settings).logits


@torch.no_grad()
def masked_logits(model, masks):
    """Logits of the unpruned model with its activations gated: independent of the export."""
    stack = find_decoder_stack(model)
    layer = DISPLayer(stack.module, stack)
    gates = [chosen[name].float() for chosen in masks for name in SELECTIONS]
    with layer.gates.using(gates):
        result = logits(model)
    layer.remove_hooks()
    return result


@pytest.mark.parametrize("name", CONFIGS)
def test_pruned_model_is_the_masked_one(name):
    model = tiny(name)
    masks = random_masks(model)
    expected = masked_logits(model, masks)
    assert (expected - logits(model)).abs().max() > 0.1
    small = prune_blocks(model, masks)
    torch.testing.assert_close(logits(small), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_counted_as_they_are(name):
    model = tiny(name)
    masks = random_masks(model)
    layout = PruningLayout.of(find_decoder_stack(model))

    def parameters(model):
        return sum(p.numel() for p in find_decoder_stack(model).blocks.parameters())

    assert parameters(model) == layout.total
    widths = [[int(chosen[name].sum()) for name in SELECTIONS] for chosen in masks]
    assert parameters(prune_blocks(model, masks)) == layout.count(widths)
    assert layout.parameters(torch.tensor(widths)) == layout.count(widths)


def test_statistics_over_the_kept_channels_would_be_another_function():
    """The paper's algorithm 1 to the letter; its figure 2 and both code bases take the norm over all channels."""
    model = tiny("llama")
    masks = random_masks(model)
    expected = masked_logits(model, masks)

    def select_then_normalise(mask):
        def hook(norm, args, output):
            x = args[0] * mask
            scale = torch.rsqrt(x.square().sum(-1, keepdim=True) / mask.sum() + norm.variance_epsilon)
            return norm.weight * x * scale

        return hook

    for block, chosen in zip(model.model.layers, masks, strict=True):
        block.input_layernorm.register_forward_hook(select_then_normalise(chosen["attention_in"].float()))
    assert (masked_logits(model, masks) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_dense_twin_computes_the_same_without_this_package(name, tmp_path):
    model = tiny(name)
    masks = random_masks(model)
    plain = type(model)
    small = prune_blocks(model, masks)
    dense = to_dense(small)
    assert type(dense) is plain
    torch.testing.assert_close(logits(dense), logits(small), atol=1e-5, rtol=1e-5)
    dense.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(plain.from_pretrained(tmp_path)), logits(small), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "gpt_neox"])
def test_generation_with_and_without_cache(name):
    model = tiny(name)
    small = prune_blocks(model, random_masks(model))
    settings = {"max_new_tokens": 12, "do_sample": False}
    cached = small.generate(IDS, **settings)
    assert torch.equal(cached, small.generate(IDS, use_cache=False, **settings))
    row = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS[:1]], 1)
    padded = small.generate(row, attention_mask=(row > 0).long(), **settings)
    assert torch.equal(padded[0, 3:], cached[0])


def test_key_value_cache_is_as_large_as_before():
    model = tiny("llama")
    before = model(IDS, use_cache=True).past_key_values
    small = prune_blocks(model, random_masks(model))
    after = small(IDS, use_cache=True).past_key_values
    assert [layer.keys.shape for layer in after.layers] == [layer.keys.shape for layer in before.layers]


def test_fresh_process_reloads_with_the_auto_class(tmp_path):
    model = tiny("qwen2", tie_word_embeddings=True)
    small = prune_blocks(model, random_masks(model))
    small.save_pretrained(tmp_path / "small")
    torch.save(logits(small), tmp_path / "logits.pt")
    code = f"""
import torch, hf_qst
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "small")!r})
expected = torch.load({str(tmp_path / "logits.pt")!r})
with torch.no_grad():
    assert torch.equal(model(torch.tensor({IDS.tolist()})).logits, expected)
assert model.config.use_cache
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_other_types_keep_the_indices(name, tmp_path):
    model = tiny(name)
    small = prune_blocks(model, random_masks(model))
    small.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    indices = {n: b for n, b in half.named_buffers() if n.endswith("_index")}
    assert indices and all(b.dtype == torch.int64 for b in indices.values())
    assert all(torch.equal(b, dict(small.named_buffers())[n]) for n, b in indices.items())
    half.float().save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(half.float()))


def test_reloads_in_nf4_and_is_tuned_there(tmp_path):
    model = tiny("llama")
    small = prune_blocks(model, random_masks(model))
    small.save_pretrained(tmp_path)
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**NF4))
    assert quantised.model.layers[0].self_attn.module.q_proj.__class__.__name__ == "Linear4bit"
    plain = logits(small)
    assert (logits(quantised) - plain).norm() < 0.35 * plain.norm()
    tuned = get_peft_model(quantised, QSTConfig(task_type="CAUSAL_LM", r=4, downsample_rank=4))
    tuned.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for n, p in tuned.named_parameters() if p.requires_grad and "alpha" in n)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_lora_trains_on_it_and_merges(targets):
    model = tiny("llama")
    small = prune_blocks(model, random_masks(model))
    tuned = get_peft_model(
        small, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, init_lora_weights=False)
    )
    expected = logits(tuned)
    tuned.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in tuned.parameters() if p.requires_grad)
    merged = tuned.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_mixed_rank_compresses_it_and_all_of_it_reloads(name, tmp_path):
    model = tiny(name)
    small = prune_blocks(model, random_masks(model))
    before = sum(p.numel() for p in small.parameters())
    config = MixedRankConfig(
        keep_ratio=0.6, task_type="CAUSAL_LM", calibration_data=[{"input_ids": token_batch(8, 32)}], progress=False
    )
    both = get_peft_model(small, config).merge_and_unload()
    assert sum(p.numel() for p in both.parameters()) < before
    both.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(both))


def test_nf4_base_is_pruned_in_the_type_it_computes_in(tmp_path):
    base = in_nf4(tmp_path / "base")
    model = with_disp(model=base, awake=True)
    expected = logits(model)
    small = model.merge_and_unload()
    torch.testing.assert_close(logits(small), expected, atol=1e-4, rtol=1e-4)
    assert getattr(small.config, "quantization_config", None) is None
    small.save_pretrained(tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(logits(again), logits(small))


def test_bfloat16_model_stays_bfloat16():
    model = tiny("llama", dtype=torch.bfloat16)
    small = prune_blocks(model, random_masks(model))
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}


def test_everything_kept_leaves_the_model_alone():
    model = tiny("llama")
    masks = [{name: torch.ones_like(mask) for name, mask in chosen.items()} for chosen in random_masks(model)]
    assert prune_blocks(model, masks) is model
    assert type(model).__name__ == "LlamaForCausalLM"


def test_gradients_reach_the_narrow_weights():
    model = tiny("llama")
    small = prune_blocks(model, random_masks(model)).train()
    small(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in small.parameters())


def test_copies_are_independent():
    model = tiny("llama")
    small = prune_blocks(model, random_masks(model))
    before = logits(small)
    other = copy.deepcopy(small)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(logits(small), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda masks: masks[:-1], "each of the 3 blocks, got 2"),
        (
            lambda masks: [{**masks[0], "mlp_in": masks[0]["mlp_in"][:-1]}, *masks[1:]],
            r"masks\[0\]\['mlp_in'\] must be",
        ),
        (
            lambda masks: [masks[0], {**masks[1], "mlp_out": torch.zeros(64, dtype=torch.bool)}, masks[2]],
            r"masks\[1\]\['mlp_out'\] must keep at least one",
        ),
        (lambda masks: [{**masks[0], "mlp_in": masks[0]["mlp_in"].float()}, *masks[1:]], "must be bool"),
    ],
)
def test_masks_that_do_not_fit_leave_the_model_unchanged(change, message):
    model = tiny("llama")
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        prune_blocks(model, change(random_masks(model)))
    assert type(model).__name__ == "LlamaForCausalLM" and torch.equal(logits(model), before)


def test_pruning_twice_is_refused():
    model = tiny("llama")
    masks = random_masks(model)
    small = prune_blocks(model, masks)
    with pytest.raises(ValueError, match="pruned, compressed or wrapped before"):
        prune_blocks(small, masks)


def test_post_norm_decoders_are_refused_by_name():
    model = tiny("opt", do_layer_norm_before=False)
    with pytest.raises(UnsupportedArchitectureError, match="OPTForCausalLM with this config is a post-norm"):
        prune_blocks(model, random_masks(model))
