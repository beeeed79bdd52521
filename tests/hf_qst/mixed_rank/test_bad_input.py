"""Requests that cannot be met: one clear error each, and the model is as before."""

import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu
from peft import get_peft_model

from hf_qst.mixed_rank import MixedRankConfig, NoDenseWeightsError, compress_model
from tests.architectures import digest, in_nf4, tiny, token_batch

IDS = token_batch(seed=50)


def batches(count=3):
    return [{"input_ids": token_batch(4, 12, seed=s)} for s in range(count)]


def config(**changes):
    return MixedRankConfig(**{"keep_ratio": 0.5, "calibration_data": batches(), "progress": False, **changes})


def compressed(model=None, **changes):
    return get_peft_model(tiny("llama") if model is None else model, config(**changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"target_modules": ["nothing"]}, "matches no linear layer"),
        ({"target_modules": ["mlp"]}, "matches no linear layer"),
        ({"target_modules": ["lm_head"]}, "lies outside 'model'"),
        ({"exclude_modules": ".*"}, "matches no linear layer"),
        ({"rank_pattern": {"nothing": 3}}, "rank_pattern names 'nothing'"),
        ({"rank_pattern": {"q_proj": 65}}, "must be from 0 to 64"),
        ({"calibration_data": []}, "at least one batch"),
        ({"calibration_data": [{}]}, r"batch 0 holds no model input \(keys: none\)"),
        ({"calibration_data": [{"input_ids": IDS[:0]}]}, "batch 0 holds no model input"),
        ({"calibration_data": [{"input_ids": IDS, "attention_mask": IDS * 0}]}, "sees no rows of calibration_data"),
        ({"calibration_data": [{"input_ids": IDS, "attention_mask": IDS[0]}]}, r"must be \[batch, seq\], got shape"),
        ({"allocation": "auto", "calibration_data": batches(1)}, "allocator='auto' .*at least 2 batches, got 1"),
        ({"compensation": "kd", "calibration_data": batches(1)}, "compensation='kd' .*at least 2 batches, got 1"),
        ({"allocation": "auto", "calibration_data": None}, "allocator='auto' needs calibration_data, got None"),
        (
            {"allocation": {"layer_weight": "fisher"}, "calibration_data": None},
            "layer_weight='fisher' needs calibration_data",
        ),
        ({"keep_ratio": 1e-3}, r"keep_ratio must be at least 0\.\d+"),
        ({"rank_pattern": dict.fromkeys(("q_proj", "k_proj"), 32), "keep_ratio": 0.1}, "cannot be met"),
        ({"calibration_data": [torch.ones(2)]}, "batch 0 is Tensor"),
        ({"keep_ratio": 1.0}, "nothing to compress"),
    ],
)
def test_bad_requests_leave_the_model_alone(changes, message):
    model = tiny("llama")
    before, structure = digest(model), str(model)
    with pytest.raises(ValueError, match=message):
        compressed(model=model, **changes)
    assert digest(model) == before and str(model) == structure


def test_weights_with_nan_are_named():
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.2\.self_attn\.o_proj' holds NaN"):
        compressed(model=model)


def test_compressing_twice_is_refused():
    small = compress_model(tiny("llama"), config(allocation={"allow_dense": False}))
    before = str(small)
    for selected in (None, ["q_proj"], ["down"]):
        with pytest.raises(ValueError, match="is compressed already"):
            compress_model(small, config(target_modules=selected))
    assert str(small) == before


def test_shared_weights_are_refused():
    model = tiny("llama")
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj' shares its weight"):
        compressed(model=model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "changes", [{}, {"compensation": "none"}, {"allocation": "auto"}, {"allocation": {"layer_weight": "fisher"}}]
)
def test_activations_that_are_not_finite_name_the_module(value, changes):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = value
    before, structure = digest(model), str(model)
    with pytest.raises(
        ValueError, match=r"inputs of module 'model\.layers\.1\.self_attn\.q_proj' hold NaN or infinite"
    ):
        compressed(model=model, **changes)
    assert digest(model) == before and str(model) == structure
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_quantised_reference_is_refused(tmp_path):
    model = tiny("llama")
    before = digest(model)
    with pytest.raises(ValueError, match=r"reference_model must have the dense weight of .*found it in nf4; load"):
        compressed(model=model, residual={"reference_model": in_nf4(tmp_path)})
    assert digest(model) == before


def test_dense_shapes_of_a_quantised_base_are_refused_while_the_adapter_is_whole(tmp_path):
    """A model that holds other layers in 4 bits has no floating-point form to go to."""
    model = compressed(model=in_nf4(tmp_path), rank_pattern={"up_proj": 0})
    structure = str(model)
    with pytest.raises(NotImplementedError, match=r"layers.*' is in nf4.*merge_and_unload\(\) gives the smaller model"):
        model.to_dense()
    assert str(model) == structure


@pytest.mark.parametrize("changes", [{"allocation": {"layer_weight": "fisher"}}, {"compensation": "kd"}])
def test_a_base_that_has_lost_its_backward_is_refused(changes, tmp_path):
    """As after an evaluation on a processor with AVX512-BF16; possible on any."""
    model = in_nf4(tmp_path)
    compressed(model=model, **changes)  # not packed: nothing is in the way
    model = in_nf4(tmp_path)
    layer = model.model.layers[1].mlp.up_proj
    layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    with pytest.raises(ValueError, match=r"needs a backward pass, which 'model\.layers\.1\.mlp\.up_proj' has lost"):
        compressed(model=model, **changes)
    compressed(model=model)


def test_a_peft_model_is_not_compressed_again():
    model = compressed()
    with pytest.raises(ValueError, match="compressed by mixed rank once"):
        model.base_model._check_new_adapter_config(config())
    with pytest.raises(NoDenseWeightsError):
        model.unload()
