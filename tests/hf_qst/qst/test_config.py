"""A configuration says at once what is wrong with it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftConfig, get_peft_model

from hf_qst import QSTConfig
from hf_qst.qst.config import DOWNSAMPLE_KINDS
from tests.architectures import side_network, side_tuned, tiny

BAD = [
    ("r", 0, "integer >= 1"),
    ("r", -4, "integer >= 1"),
    ("r", 2.5, "integer >= 1"),
    ("r", "8", "integer >= 1"),
    ("r", True, "integer >= 1"),
    ("downsample", "maxpoool", "one of linear, lora, adapter, maxpool, avgpool, principal"),
    ("downsample", None, "one of"),
    ("downsample_rank", 0, "integer >= 1"),
    ("downsample_rank", 1.5, "integer >= 1"),
    ("downsample_dropout", 1.0, "[0, 1)"),
    ("downsample_dropout", -0.1, "[0, 1)"),
    ("downsample_dropout", float("nan"), "[0, 1)"),
    ("downsample_dropout", "0.1", "[0, 1)"),
    ("downsample_layernorm", "yes", "True or False"),
    ("tap_storage", "int4", "int8 or full"),
    ("side_heads", "none", "auto or keep"),
    ("gate_shape", "matrix", "scalar or vector"),
    ("gate_init", float("inf"), "finite"),
    ("gate_init", "zero", "finite"),
    ("mix", "sum", "one of residual, paper, sigmoid"),
    ("mix_shape", 1, "scalar or vector"),
    ("mix_lr_scale", 0, "positive"),
    ("mix_lr_scale", float("nan"), "positive"),
    ("mix_lr_scale", float("inf"), "positive"),
    ("mix_lr_scale", "10", "positive"),
    ("side_checkpointing", 1, "True, False or 'mlp'"),
    ("side_checkpointing", "attention", "True, False or 'mlp'"),
    ("chunked_loss", "no", "True or False"),
    ("modules_to_save", "score", "list of module names"),
    ("modules_to_save", [1], "list of module names"),
]


@pytest.mark.parametrize(("name", "value", "accepted"), BAD, ids=[f"{n}={v!r}" for n, v, _ in BAD])
def test_bad_value_is_named_with_what_is_accepted(name, value, accepted):
    with pytest.raises(ValueError, match=f"QSTConfig.{name} must be") as error:
        QSTConfig(**{name: value})
    assert accepted in str(error.value)
    assert repr(value) in str(error.value)


def test_unknown_argument_is_refused():
    with pytest.raises(TypeError, match="rank"):
        QSTConfig(rank=4)
    with pytest.raises(TypeError, match="target_modules"):
        QSTConfig(target_modules=["q_proj"])


def test_calibration_data_for_another_downsampler_is_refused():
    with pytest.raises(ValueError, match="only used by downsample='principal', got downsample='adapter'"):
        QSTConfig(calibration_data=[{"input_ids": torch.ones(1, 2)}])


@pytest.mark.parametrize("r", [3, 7, 48])
def test_reduction_that_does_not_divide_the_width_is_refused(r):
    with pytest.raises(ValueError, match=f"QSTConfig.r must divide the base's hidden size 64, got {r}"):
        side_tuned("llama", r=r)


def test_reduction_without_an_even_head_size_is_refused():
    # A side width of 1 has no even head size.
    with pytest.raises(ValueError, match=r"QSTConfig\.r=64 .* side width of 1 .* base's head size 16"):
        side_tuned("llama", r=64)
    # 16 channels of a head divided by 16 leave 1.
    with pytest.raises(ValueError, match="side_heads='keep'"):
        side_tuned("llama", r=16, side_heads="keep")


def test_failed_reduction_leaves_the_base_usable():
    base = tiny("llama")
    with pytest.raises(ValueError, match=r"QSTConfig\.r"):
        side_tuned(model=base, r=7)
    assert side_tuned(model=base, r=4)(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.shape == (1, 3, 96)


def test_paper_and_reference_settings_are_as_documented():
    paper, reference = QSTConfig.paper(), QSTConfig.reference()
    assert (paper.r, paper.downsample, paper.downsample_rank, paper.mix) == (16, "adapter", 16, "paper")
    assert (paper.gate_shape, paper.gate_init, paper.mix_shape) == ("scalar", 0.0, "scalar")
    assert (reference.mix, reference.mix_shape, reference.gate_shape) == ("sigmoid", "vector", "vector")
    assert (reference.gate_init, reference.side_heads) == (0.5, "keep")
    assert QSTConfig.paper(r=8, mix="residual").mix == "residual"


def test_authors_start_is_theirs():
    """beta 0.622 on the side's own state and 0.731 on the base's output."""
    model = side_tuned("llama", mix="sigmoid", mix_shape="vector", gate_shape="vector", gate_init=0.5)
    network = side_network(model)
    assert torch.sigmoid(network.gates[0].value).allclose(torch.tensor(0.6225), atol=1e-4)
    mixed = network.mix(torch.ones(1, 1, 64), torch.zeros(1, 1, 64))
    assert mixed.allclose(torch.tensor(0.7311), atol=1e-4)


def test_calibration_data_is_not_saved_nor_lost(tmp_path):
    batches = [{"input_ids": torch.ones(1, 4, dtype=torch.long)}]
    config = QSTConfig(r=4, downsample="principal", calibration_data=batches)
    config.save_pretrained(tmp_path)
    assert config.calibration_data is batches
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert loaded.calibration_data is None
    assert loaded == config


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.floats(),
    st.text(max_size=4),
    st.sampled_from([*DOWNSAMPLE_KINDS, "scalar", "vector", "auto", "keep", "paper", "residual", "int8", "full"]),
    st.lists(st.text(max_size=3), max_size=2),
)
FIELDS = [
    "r",
    "downsample",
    "downsample_rank",
    "downsample_layernorm",
    "downsample_dropout",
    "tap_storage",
    "side_heads",
    "gate_shape",
    "gate_init",
    "mix",
    "mix_shape",
    "mix_lr_scale",
    "side_checkpointing",
    "chunked_loss",
    "modules_to_save",
]


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(FIELDS), value=VALUES)
def test_any_value_is_taken_or_refused_by_its_field(name, value):
    try:
        config = QSTConfig(**{name: value})
    except (ValueError, TypeError) as error:
        assert f"QSTConfig.{name}" in str(error)
    else:
        assert config.to_dict()[name] == value


@settings(max_examples=25, deadline=None)
@given(
    r=st.sampled_from([1, 2, 3, 4, 8, 16, 32, 64]),
    downsample=st.sampled_from(DOWNSAMPLE_KINDS),
    downsample_rank=st.integers(1, 5),
    downsample_layernorm=st.booleans(),
    side_heads=st.sampled_from(["auto", "keep"]),
    gate_shape=st.sampled_from(["scalar", "vector"]),
    mix=st.sampled_from(["residual", "paper"]),
    name=st.sampled_from(["llama", "gpt2", "qwen3", "gpt_neox"]),
)
def test_any_accepted_configuration_starts_at_the_base_or_is_refused_by_r(name, **values):
    base, ids = tiny(name), torch.arange(3, 9)[None]
    with torch.no_grad():
        expected = base(input_ids=ids).logits
        try:
            model = get_peft_model(base, QSTConfig(task_type="CAUSAL_LM", **values))
        except ValueError as error:
            assert "QSTConfig.r" in str(error)
            return
        assert torch.equal(model(input_ids=ids).logits, expected)
