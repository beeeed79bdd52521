"""The configuration: what it accepts, what it says about the rest, and its way through JSON."""

import json
import pickle

import pytest
from peft import PeftConfig

from hf_qst.mixed_rank import MixedRankConfig

WRONG = {
    "keep_ratio": [0, -0.1, 1.5, float("nan"), "half", True],
    "budget_scope": ["layers", None],
    "metric": ["svd", None],
    "shrinkage": ["oas", -0.1, 1.1, True],
    "shrinkage_scale": [-1, float("inf")],
    "allocator": ["greedy"],
    "rank_multiple": [0, 2.5, "8", True],
    "min_rank_ratio": [-0.1, 1.5],
    "allow_dense": [1, "yes"],
    "compensation": ["distil", None],
    "layer_weight": ["hessian", None],
    "min_saving": [-0.1, 1.0, "half"],
    "quantize_factors": ["int4", 8, False],
    "compensation_ridge": [-1e-3, 2],
    "residual_ratio": [-0.1, 1.1],
    "compensation_steps": [0, 1.5],
    "compensation_lr": [0, -1.0],
    "memory_limit": [0, 1e9],
    "max_calibration_batches": [0, "all"],
    "seed": [-1, 0.5],
    "progress": [None],
    "bias_correction": [1],
    "rank_pattern": [{"q_proj": -1}, {"q_proj": 2.0}, {3: 2}, ["q_proj"]],
    "target_modules": [3, [4]],
    "exclude_modules": [3],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in WRONG.items() for value in values])
def test_wrong_values_are_named(name, value):
    with pytest.raises(ValueError) as caught:
        MixedRankConfig(**{name: value})
    assert f"MixedRankConfig.{name} must be" in str(caught.value) and repr(value) in str(caught.value)


@pytest.mark.parametrize("compensation", ["lstsq", "gradient", "kd"])
def test_compensation_goes_with_the_second_moment_only(compensation):
    with pytest.raises(ValueError, match=r"needs metric='second_moment', got metric='diagonal'"):
        MixedRankConfig(metric="diagonal", compensation=compensation)


@pytest.mark.parametrize("changes", [{"mode": "residual"}, {"compensation": "gradient"}, {"metric": "plain"}])
def test_bias_correction_goes_with_the_closed_forms_only(changes):
    with pytest.raises(ValueError, match=f"bias_correction .*got .*{next(iter(changes.values()))!r}"):
        MixedRankConfig(bias_correction=True, **changes)


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="keep_ration"):
        MixedRankConfig(keep_ration=0.5)


def test_round_trip_through_a_file(tmp_path):
    config = MixedRankConfig(
        keep_ratio=0.3,
        target_modules={"q_proj", "k_proj"},
        rank_pattern={"a.q_proj": 3},
        statistics={"a.q_proj": {"relative_error": 0.1}},
        shrinkage=None,
        calibration_data=iter([{}]),
    )
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert loaded == config and isinstance(loaded, MixedRankConfig)
    assert loaded.target_modules == ["k_proj", "q_proj"]
    assert loaded.calibration_data is None and config.calibration_data is not None
    json.dumps(config.to_dict())


def test_pickled_config_is_equal():
    config = MixedRankConfig(keep_ratio=0.7)
    again = pickle.loads(pickle.dumps(config))
    assert again == config and again.peft_type is config.peft_type
