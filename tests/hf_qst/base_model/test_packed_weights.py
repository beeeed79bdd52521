"""4-bit weights are what was loaded, whatever layout bitsandbytes gives them: when saved, trained through, and run again."""

import copy
import logging

import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu, has_avx512bf16
from bitsandbytes.nn import Linear4bit, LinearNF4
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_qst import DISPConfig, MixedRankConfig
from hf_qst.base_model import forbid_packing, packed_weights
from hf_qst.base_model.packed_weights import find_packed, nf4_weight, unpack
from hf_qst_kernels.nf4_weight import naive_weight
from tests.architectures import NF4, digest, in_nf4, side_tuned, tiny, token_batch
from tests.pruned_models import with_disp


def pack(model):
    """What bitsandbytes does at the first forward on a processor with AVX512-BF16; possible on any."""
    for module in model.modules():
        if isinstance(module, Linear4bit) and not getattr(module.weight.quant_state, "packing_format_for_cpu", False):
            module.weight.data, module.weight.quant_state = _convert_weight_packed_for_cpu(
                module.weight.data, module.weight.quant_state
            )


@pytest.fixture
def base(tmp_path):
    model = in_nf4(tmp_path)
    pack(model)
    return model


def test_bare_base_is_changed_by_its_state_dict(base):
    """The reason for the module under test; if this fails, bitsandbytes has been repaired and the module can go."""
    before = digest(base)
    base.state_dict()
    pack(base)
    assert digest(base) != before


def test_tuned_base_is_not_changed(base, tmp_path):
    before = digest(base)
    model = side_tuned(model=base, awake=True)
    model.state_dict()
    model.save_pretrained(tmp_path / "adapter")
    copy.deepcopy(model).state_dict()
    assert digest(model.get_base_model()) == before
    assert all(m.weight.quant_state.packing_format_for_cpu for m in base.modules() if isinstance(m, Linear4bit))


PACKS = pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes packs on processors with AVX512-BF16 only")
IDS = token_batch()


def weights_of(state_dict):
    """The base's entries of a state dict, adapters left out, by the names that they have without one."""
    return {k.replace(".base_layer.", "."): v.clone() for k, v in state_dict.items() if "qst_" not in k}


def loaded_in_nf4(folder, double: bool, **sizes):
    tiny("llama", **sizes).save_pretrained(folder)
    settings = BitsAndBytesConfig(**{**NF4, "bnb_4bit_use_double_quant": double})
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, device_map={"": "cpu"}).eval()


@torch.no_grad()
def run(model):
    return model.eval()(input_ids=IDS, use_cache=False).logits


@PACKS
@pytest.mark.parametrize("double", [True, False])
def test_state_dict_of_a_packed_base_is_what_was_loaded(double, tmp_path):
    """bitsandbytes by itself quantises the scales anew, or leaves them in the order of the packed layout."""
    base = loaded_in_nf4(tmp_path, double)
    before = weights_of(base.state_dict())
    model = side_tuned(model=base, awake=True)
    first = run(model)
    assert find_packed(base) is not None
    for one in (model, copy.deepcopy(model)):
        got = weights_of(one.get_base_model().state_dict())
        assert got.keys() == before.keys()
        assert [name for name in got if not torch.equal(got[name], before[name])] == []
        assert find_packed(one) is not None and torch.equal(run(one), first)


@pytest.mark.parametrize("double", [True, False])
def test_a_base_that_was_packed_before_is_saved_with_rounded_scales_in_their_places(double):
    """Of 4,096 weights in 64 blocks a scale is rounded to bfloat16, hence by 1 / 256 at most, and then to 8 bits of their range."""
    layer = linear4bit(128, 64, compress_statistics=double)
    before = naive_dense(layer)
    pack(layer)
    unpack(layer)
    after = naive_dense(layer)
    assert (after - before).norm() / before.norm() < (0.02 if double else 1 / 256)
    assert not torch.equal(after, before) and find_packed(layer) is None


def naive_dense(layer):
    return naive_weight(nf4_weight(layer), torch.float32)


@PACKS
def test_the_user_is_told_once_that_the_base_is_packed(base, caplog, tmp_path):
    packed_weights._say_packed.cache_clear()
    with caplog.at_level(logging.WARNING):
        for folder in ("a", "b"):
            side_tuned(model=loaded_in_nf4(tmp_path / folder, True))
    said = [record for record in caplog.records if "bitsandbytes repacks" in record.message]
    assert len(said) == 1 and "forbid_packing" in said[0].message
    model = loaded_in_nf4(tmp_path / "c", True)
    forbid_packing(model)
    packed_weights._say_packed.cache_clear()
    caplog.clear()
    run(side_tuned(model=model))
    assert find_packed(model) is None and not [r for r in caplog.records if "repacks" in r.message]


@pytest.mark.parametrize(
    "sizes",
    [{"hidden_size": 48, "head_dim": 12}, {"intermediate_size": 84}, {"intermediate_size": 72, "hidden_size": 40, "head_dim": 10}],
    ids=["48 inputs", "84 outputs", "both"],
)  # fmt: skip
def test_widths_that_the_packed_layout_has_no_room_for(sizes, tmp_path):
    """Where bitsandbytes packs, the base alone fails in its first evaluation."""
    base = loaded_in_nf4(tmp_path, True, **sizes)
    if has_avx512bf16():
        with pytest.raises((RuntimeError, AssertionError), match=r"is invalid for input|must be divisible"):
            run(copy.deepcopy(base))
    model = side_tuned(model=base, awake=True)
    expected = run(model)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert torch.equal(run(model), expected)


def gradients(model):
    torch.manual_seed(0)
    model.zero_grad()
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _residual(base):
    reference = tiny("llama")
    settings = {"reference_model": reference, "rank": 4}
    return get_peft_model(
        base, MixedRankConfig(residual=settings, calibration_data=[{"input_ids": IDS}], progress=False)
    )


def _factored(base):
    targets = ["down_proj"]
    config = MixedRankConfig(
        target_modules=targets, calibration_data=[{"input_ids": IDS}], decomposition="plain", progress=False
    )
    return get_peft_model(base, config)


TRAINED_THROUGH = {
    "tail": lambda base: side_tuned(model=base, awake=True, tail_layers=1, tail_rank=4),
    "disp": lambda base: get_peft_model(base, DISPConfig(keep_ratio=0.6)),
    "residual": _residual,
    "factored": _factored,
}


@pytest.mark.parametrize("method", TRAINED_THROUGH)
def test_gradients_are_the_same_before_and_after_an_evaluation(method, tmp_path):
    """A packed layer has no backward pass, so that what lies below it would get no gradient."""
    torch.manual_seed(2)
    model = TRAINED_THROUGH[method](loaded_in_nf4(tmp_path, False))
    before = gradients(model)
    run(model)
    after = gradients(model)
    assert before.keys() == after.keys() and before
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@PACKS
def test_what_packing_does_to_a_plain_model(tmp_path):
    """The reasons for the module under test; if this fails, bitsandbytes has been repaired."""
    tuned = get_peft_model(
        loaded_in_nf4(tmp_path / "lora", False), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    before = gradients(tuned)
    run(tuned)
    after = gradients(tuned)
    assert after.keys() < before.keys()  # those of the blocks below have none
    base = loaded_in_nf4(tmp_path / "base", False)
    expected = run(base)
    assert torch.equal(run(base), expected)
    base.state_dict()
    assert (run(base) - expected).norm() > 5e-3 * expected.norm()


@PACKS
def test_factors_of_a_base_that_was_packed_before_do_not_train_until_it_is_unpacked(tmp_path):
    base = loaded_in_nf4(tmp_path, False)
    run(base)
    assert find_packed(base) is not None
    model = _factored(base)
    run(model)
    with pytest.raises(ValueError, match=r"bitsandbytes has packed '.*' for a kernel without backward"):
        gradients(model)
    unpack(model)
    assert find_packed(model) is None
    found = gradients(model)
    assert found and all(gradient.abs().sum() > 0 for gradient in found.values())


@pytest.mark.parametrize("double", [True, False])
def test_a_reshaped_model_saves_the_same_after_an_evaluation(double, tmp_path):
    small = with_disp(awake=True, keep_ratio=0.7, width_multiple=64, selections=["mlp_middle"]).merge_and_unload()
    small.save_pretrained(tmp_path / "float")
    settings = BitsAndBytesConfig(**{**NF4, "bnb_4bit_use_double_quant": double})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=settings)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = run(model)
    model.save_pretrained(tmp_path / "nf4")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4")
    after = again.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert torch.equal(run(again), expected)
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    first = gradients(tuned)
    run(tuned)
    second = gradients(tuned)
    assert first and all(torch.equal(first[name], second[name]) for name in first)


def test_unloaded_base_has_no_hooks(base):
    unloaded = side_tuned(model=base).unload()
    assert not any(m._state_dict_pre_hooks or m._state_dict_hooks for m in unloaded.modules())


def linear4bit(inputs=64, outputs=96, kind=Linear4bit, blocksize=64, **settings):
    if kind is Linear4bit:
        settings = {"quant_type": "nf4", **settings}
    layer = kind(inputs, outputs, compute_dtype=torch.float32, **settings)
    layer.weight.blocksize = blocksize
    return layer.to("cpu")


@pytest.mark.parametrize("double", [False, True])
def test_kernels_read_what_the_layer_multiplies_with(double):
    for layer in (linear4bit(compress_statistics=double), linear4bit(kind=LinearNF4, compress_statistics=double)):
        weight = nf4_weight(layer)
        assert (weight.nested_absmax is not None) == double and weight.packed.data_ptr() == layer.weight.data_ptr()
        torch.testing.assert_close(
            torch.eye(64) @ naive_weight(weight, torch.float32).T + layer.bias, layer(torch.eye(64))
        )


def test_kernels_do_not_read_other_layers(tmp_path):
    not_quantised = Linear4bit(64, 96, quant_type="nf4")
    packed = linear4bit()
    pack(packed)
    others = {
        "plain": torch.nn.Linear(64, 96),
        "not quantised": not_quantised,
        "packed": packed,
        "fp4": linear4bit(quant_type="fp4"),
        "blocks of 128": linear4bit(128, 96, blocksize=128),
        "a row ends inside a block": linear4bit(96, 64),
        "stored as bfloat16": linear4bit(quant_storage=torch.bfloat16),
        "no layer": torch.nn.ReLU(),
    }
    assert [name for name, layer in others.items() if nf4_weight(layer) is not None] == []
    tuned = get_peft_model(in_nf4(tmp_path), LoraConfig(target_modules=["q_proj"]))
    adapter = tuned.base_model.model.model.layers[0].self_attn.q_proj
    assert type(adapter).__name__ == "Linear4bit" and nf4_weight(adapter) is None
    assert nf4_weight(adapter.base_layer) is not None
