"""The configuration: what it accepts, what it says about the rest, and its way through JSON."""

import json
import pickle
from pathlib import Path

import pytest
from peft import PeftConfig
from torch import nn

from hf_qst.mixed_rank import (
    AllocationConfig,
    CompensationConfig,
    CompressionResults,
    DecompositionConfig,
    MixedRankConfig,
    ResidualConfig,
)

REFERENCE = nn.Linear(2, 2)

WRONG = {
    "keep_ratio": [0, -0.1, 1.5, float("nan"), "half", True],
    "budget_scope": ["layers", None],
    "decomposition": [None, 3],
    "decomposition.metric": ["svd", None],
    "decomposition.shrinkage": ["oas", -0.1, 1.1, True],
    "decomposition.shrinkage_scale": [-1, float("inf")],
    "decomposition.bias_correction": [1],
    "allocation": [None, ["hull"]],
    "allocation.allocator": ["greedy"],
    "allocation.rank_multiple": [0, 2.5, "8", True],
    "allocation.min_rank_ratio": [-0.1, 1.5],
    "allocation.allow_dense": [1, "yes"],
    "allocation.layer_weight": ["hessian", None],
    "allocation.min_saving": [-0.1, 1.0, "half"],
    "compensation": [None],
    "compensation.method": ["distil", None],
    "compensation.ridge": [-1e-3, 2],
    "compensation.residual_ratio": [-0.1, 1.1],
    "compensation.steps": [0, 1.5],
    "compensation.lr": [0, -1.0],
    "residual": ["dense", 8],
    "residual.rank": [0, 2.5],
    "quantize_factors": ["int4", 8, False],
    "memory_limit": [0, 1e9],
    "max_calibration_batches": [0, "all"],
    "seed": [-1, 0.5],
    "progress": [None],
    "rank_pattern": [{"q_proj": -1}, {"q_proj": 2.0}, {3: 2}, ["q_proj"]],
    "target_modules": [3, [4]],
    "exclude_modules": [3],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in WRONG.items() for value in values])
def test_wrong_values_are_named(name, value):
    stage, _, field = name.partition(".")
    with pytest.raises(ValueError) as caught:
        MixedRankConfig(**{stage: {field: value} if field else value})
    assert f"MixedRankConfig.{name} must be" in str(caught.value) and repr(value) in str(caught.value)


def test_a_stage_names_its_field_by_itself():
    with pytest.raises(ValueError, match=r"MixedRankConfig\.allocation\.min_rank_ratio must be in \[0, 1\], got 2"):
        AllocationConfig(min_rank_ratio=2)


@pytest.mark.parametrize("compensation", ["lstsq", "gradient", "kd"])
def test_compensation_goes_with_the_second_moment_only(compensation):
    with pytest.raises(ValueError, match=r"needs metric='second_moment', got metric='diagonal'"):
        MixedRankConfig(decomposition="diagonal", compensation=compensation)


@pytest.mark.parametrize(
    "changes, named",
    [({"residual": {}}, "residual="), ({"compensation": "gradient"}, "'gradient'"), ({}, "'plain'")],
)
def test_bias_correction_goes_with_the_closed_forms_only(changes, named):
    metric = "auto" if changes else "plain"
    with pytest.raises(ValueError, match=f"bias_correction .*got .*{named}"):
        MixedRankConfig(decomposition={"bias_correction": True, "metric": metric}, **changes)


@pytest.mark.parametrize(
    "field, forms",
    [
        ("decomposition", ["plain", {"metric": "plain"}, DecompositionConfig("plain")]),
        ("allocation", ["uniform", {"allocator": "uniform"}, AllocationConfig("uniform")]),
        ("compensation", ["kd", {"method": "kd"}, CompensationConfig("kd")]),
        ("residual", [{"rank": 8}, ResidualConfig(rank=8)]),
    ],
)
def test_a_stage_is_its_configuration_a_dict_or_a_variant(field, forms):
    found = [MixedRankConfig(**{field: form}) for form in forms]
    assert all(one == found[-1] and getattr(one, field) == forms[-1] for one in found)
    assert getattr(found[-1], field) is not forms[-1]


def test_unknown_fields_of_a_stage_are_refused():
    with pytest.raises(TypeError, match=r"MixedRankConfig\.allocation has no field 'alocator'; it has allocator, "):
        MixedRankConfig(allocation={"alocator": "hull"})


def test_results_are_no_arguments():
    for name in ("results", "statistics", "dense_modules"):
        with pytest.raises(TypeError):
            MixedRankConfig(**{name: {}})


EARLIER = [
    ({"metric": "diagonal", "shrinkage": None}, {"decomposition": {"metric": "diagonal", "shrinkage": None}}),
    (
        {"shrinkage_scale": 2.0, "bias_correction": True},
        {"decomposition": {"shrinkage_scale": 2.0, "bias_correction": True}},
    ),
    ({"allocator": "auto", "layer_weight": "fisher"}, {"allocation": {"allocator": "auto", "layer_weight": "fisher"}}),
    (
        {"rank_multiple": 4, "min_rank_ratio": 0.2, "allow_dense": False, "min_saving": 0.1},
        {"allocation": {"rank_multiple": 4, "min_rank_ratio": 0.2, "allow_dense": False, "min_saving": 0.1}},
    ),
    (
        {"compensation": "kd", "compensation_steps": 3, "compensation_lr": 0.1, "compensation_ridge": 0.2},
        {"compensation": {"method": "kd", "steps": 3, "lr": 0.1, "ridge": 0.2}},
    ),
    (
        {"compensation": CompensationConfig("gradient"), "residual_ratio": 0.3},
        {"compensation": {"method": "gradient", "residual_ratio": 0.3}},
    ),
    (
        {"mode": "residual", "residual_rank": 4, "reference_model": REFERENCE},
        {"residual": {"rank": 4, "reference_model": REFERENCE}},
    ),
    ({"mode": "residual"}, {"residual": {}}),
    ({"mode": "replace", "residual_rank": 4}, {}),
]


@pytest.mark.parametrize("earlier, today", EARLIER)
def test_earlier_names_warn_and_give_the_same(earlier, today):
    with pytest.warns(FutureWarning) as caught:
        found = MixedRankConfig(keep_ratio=0.3, **earlier)
    assert found == MixedRankConfig(keep_ratio=0.3, **today)
    (warning,) = caught
    assert warning.filename == __file__ and all(field in str(warning.message) for field in today)
    for name, value in earlier.items():
        if name not in ("mode", "compensation") and today:
            assert getattr(found, name) == value
    assert found.residual is None or found.residual.reference_model is earlier.get("reference_model")


def test_earlier_names_are_checked_under_those_of_today():
    with (
        pytest.warns(FutureWarning),
        pytest.raises(ValueError, match=r"MixedRankConfig\.allocation\.allocator must be"),
    ):
        MixedRankConfig(allocator="greedy")
    with pytest.raises(ValueError, match="reference_model is only used by mode='residual', got mode='replace'"):
        MixedRankConfig(mode="replace", reference_model=REFERENCE)
    with pytest.raises(ValueError, match="mode must be one of replace, residual, got 'add'"):
        MixedRankConfig(mode="add")
    with pytest.raises(AttributeError, match="no attribute 'metrics'"):
        MixedRankConfig().metrics  # noqa: B018


SAVED = Path(__file__).parents[2] / "saved_files" / "2026-11-26" / "mixed_rank_adapter"


@pytest.mark.parametrize("unknown", [{}, {"of_a_later_version": 1}])
def test_a_file_with_earlier_names_loads_without_a_warning_for_them(unknown, tmp_path, recwarn):
    saved = json.loads((SAVED / "adapter_config.json").read_text())
    changes = {"allocator": "auto", "layer_weight": "fisher", "mode": "residual", "residual_rank": 5}
    record = {"chosen": {"allocator": "uniform"}}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**saved, **changes, **unknown, "allocation": record}))
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert [str(w.message)[:31] for w in recwarn] == ["Unexpected keyword arguments ['"] * len(unknown)
    assert loaded.allocation == AllocationConfig("auto", "fisher") and loaded.residual == ResidualConfig(rank=5)
    assert loaded.rank_pattern == saved["rank_pattern"] and loaded.manifest == saved["manifest"]
    assert loaded.results.dense_modules == saved["dense_modules"] and loaded.results.statistics == saved["statistics"]
    assert loaded.results.allocation == record


def test_unknown_keys_of_a_file_are_named_in_one_warning(tmp_path):
    config = MixedRankConfig(keep_ratio=0.3, allocation="uniform", compensation="none")
    config.results.statistics["a"] = {"relative_error": 0.1}
    config.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    saved["later"], saved["allocation"]["later"] = 1, 2
    path.write_text(json.dumps(saved))
    with pytest.warns(
        UserWarning, match=r"\['allocation.later', 'later'\] for class MixedRankConfig, these are ignored"
    ):
        assert PeftConfig.from_pretrained(tmp_path) == config


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="keep_ration"):
        MixedRankConfig(keep_ration=0.5)


def test_round_trip_through_a_file(tmp_path):
    config = MixedRankConfig(
        keep_ratio=0.3,
        target_modules={"q_proj", "k_proj"},
        rank_pattern={"a.q_proj": 3},
        decomposition={"shrinkage": None},
        allocation="gradual",
        compensation=CompensationConfig("lstsq", ridge=0.1),
        residual={"rank": 4, "reference_model": REFERENCE},
        calibration_data=iter([{}]),
    )
    config.results = CompressionResults(["b"], {"a.q_proj": {"relative_error": 0.1}}, {"chosen": {}}, {"steps": 2})
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert loaded == config and isinstance(loaded, MixedRankConfig)
    assert loaded.target_modules == ["k_proj", "q_proj"]
    assert loaded.calibration_data is None and config.calibration_data is not None
    assert loaded.residual.reference_model is None and config.residual.reference_model is REFERENCE
    assert type(loaded.results) is CompressionResults and type(loaded.allocation) is AllocationConfig
    assert json.loads(json.dumps(config.to_dict()))["compensation"]["ridge"] == 0.1


@pytest.mark.parametrize(
    "has_data, given, expected",
    [
        (True, {}, ("second_moment", "lstsq", None)),
        (True, {"decomposition": "diagonal"}, ("diagonal", "none", None)),
        (True, {"compensation": "gradient"}, ("second_moment", "gradient", 300)),
        (False, {}, ("plain", "none", None)),
    ],
)
def test_resolved_settings_are_plain(has_data, given, expected):
    config = MixedRankConfig(**given)
    found = config.resolved(has_data, 64)
    assert (found.decomposition.metric, found.compensation.method, found.compensation.steps) == expected
    assert found.allocation.rank_multiple == 1 and config == MixedRankConfig(**given)


def test_pickled_config_is_equal():
    config = MixedRankConfig(keep_ratio=0.7)
    again = pickle.loads(pickle.dumps(config))
    assert again == config and type(again.peft_type) is type(config.peft_type)
