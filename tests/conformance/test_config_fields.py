"""Every combination of a configuration's fields builds a model that computes, or is refused by an error that names a field.

`--cases` draws more combinations: `pytest tests/conformance/test_config_fields.py --cases 1000`.
"""

import dataclasses
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from peft.config import PeftConfig, PeftConfigMixin

from hf_qst import DISPConfig, MixedRankConfig, QSTConfig
from hf_qst.disp.estimators import ESTIMATORS
from hf_qst.mixed_rank.allocation.allocators import ALLOCATORS
from hf_qst.mixed_rank.compensation.stage import COMPENSATIONS
from hf_qst.mixed_rank.decomposition.metrics import METRICS
from hf_qst.mixed_rank.sensitivity import LAYER_WEIGHTS
from hf_qst.pruning import PRUNING_METHODS
from hf_qst.qst.config import DOWNSAMPLE_KINDS, MIX_KINDS
from hf_qst.tuner.config import BUDGET_SCOPES, MethodConfig
from tests.architectures import token_batch
from tests.conformance.methods import IDS, small

DATA = [{"input_ids": token_batch(4, 12, seed=seed)} for seed in range(2)]
FLAGS = st.booleans()
COUNTS = st.sampled_from([1, 2, 3, 4, 8, 16, 64, 1000])
FROM_NONE = st.one_of(st.just(0), COUNTS)
SHARES = st.sampled_from([0.0, 1e-3, 0.1, 0.5, 0.9, 1.0])
KEPT = st.sampled_from([1e-3, 0.05, 0.3, 0.5, 0.9, 1.0])
LAYERS = st.sampled_from(["q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.k_proj", "nowhere"])
NAMES = st.one_of(
    st.lists(st.sampled_from(["q_proj", "up_proj", "down_proj", "lm_head", "nowhere"]), max_size=3),
    st.sampled_from(["all-linear", ".*mlp.*", ".*nowhere", ""]),
)


def of(*kinds):
    return st.sampled_from([*kinds])


def stage(**fields):
    return st.fixed_dictionaries({}, optional=fields)


# Of each field the values that its description allows; some of them do not go together.
FIELDS = {
    QSTConfig: {
        "r": of(None, 1, 2, 4, 8, 16, 64, 3, 1000),
        "side_every": COUNTS,
        "readout_rank": FROM_NONE,
        "readout_every": COUNTS,
        "tail_layers": FROM_NONE,
        "tail_rank": COUNTS,
        "downsample": of(*DOWNSAMPLE_KINDS),
        "downsample_rank": COUNTS,
        "downsample_input_norm": FLAGS,
        "downsample_layernorm": FLAGS,
        "downsample_dropout": of(0.0, 0.1, 0.9),
        "tap_storage": of("int8", "full"),
        "side_heads": of("auto", "keep"),
        "gate_shape": of("scalar", "vector"),
        "gate_init": of(-30.0, 0, 0.5, 30.0),
        "mix": of(*MIX_KINDS),
        "mix_shape": of("scalar", "vector"),
        "mix_lr_scale": of(0.1, 1, 100.0),
        "side_checkpointing": of(True, False, "mlp"),
        "chunked_loss": FLAGS,
        "modules_to_save": of(None, [], ["lm_head"], ["nowhere"]),
        "hidden_state_cache": st.none(),
        "calibration_data": of(None, DATA),
    },
    DISPConfig: {
        "keep_ratio": KEPT,
        "budget_scope": of(*BUDGET_SCOPES),
        "regularization": of(0, 6.0, 1e3),
        "selections": st.lists(of("attn_in", "attn_out", "mlp_in", "mlp_middle", "mlp_out"), max_size=6),
        "constraint": of("none", "layer", "model"),
        "estimator": of(*ESTIMATORS),
        "initial_bias": of(-3, 0.0, 3.0, 50.0),
        "temperature": of(1, 1.5, 100.0),
        "gumbel_temperature": of(0.01, 0.4, 10),
        "hypernetwork": of("gru", "linear", "none"),
        "hypernetwork_input_size": COUNTS,
        "hypernetwork_hidden_size": COUNTS,
        "hardening": of("budget", "threshold"),
        "width_multiple": st.one_of(COUNTS, of("auto")),
        "min_width": COUNTS,
        "start_scores": of(None, "none", *PRUNING_METHODS),
        "calibration_data": of(None, DATA),
        "seed": FROM_NONE,
    },
    MixedRankConfig: {
        "keep_ratio": KEPT,
        "budget_scope": of(*BUDGET_SCOPES),
        "target_modules": st.one_of(st.none(), NAMES),
        "exclude_modules": st.one_of(st.none(), NAMES),
        "calibration_data": of(None, DATA),
        "max_calibration_batches": of(None, 1, 2, 100),
        "decomposition": st.one_of(
            of("auto", *METRICS),
            stage(
                metric=of("auto", *METRICS),
                shrinkage=of(None, "ledoit_wolf", 0.0, 0.3, 1.0),
                shrinkage_scale=of(0, 1.0, 10),
                bias_correction=FLAGS,
            ),
        ),
        "allocation": st.one_of(
            of("auto", *ALLOCATORS),
            stage(
                allocator=of("auto", *ALLOCATORS),
                layer_weight=of(*LAYER_WEIGHTS),
                rank_multiple=st.one_of(st.just("auto"), COUNTS),
                min_rank_ratio=SHARES,
                allow_dense=FLAGS,
                min_saving=of(0, 0.3, 0.99),
            ),
        ),
        "compensation": st.one_of(
            of("auto", *COMPENSATIONS),
            stage(
                method=of("auto", *COMPENSATIONS),
                ridge=SHARES,
                residual_ratio=SHARES,
                steps=of(None, 1, 2),
                lr=of(None, 1e-4, 1e-2),
            ),
        ),
        "residual": of(None, {"rank": 4}),
        "quantize_factors": of(None, "nf4", "int8"),
        "keep_base_weights": FLAGS,
        "memory_limit": of(None, 1, 10_000, 10**9),
        "seed": FROM_NONE,
        "modules_to_save": of(None, [], ["lm_head"], ["nowhere"]),
        "progress": st.just(False),
        "rank_pattern": st.dictionaries(LAYERS, FROM_NONE, max_size=2),
    },
}
SHARED = {"init_weights": FLAGS, "inference_mode": FLAGS}
JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2), st.just(object()),
)  # fmt: skip


@pytest.fixture
def cases(request):
    return request.config.getoption("--cases")


def _names(kind: type) -> set[str]:
    """The fields that a user sets, without those of every PEFT configuration."""
    inherited = {each.name for base in (PeftConfig, PeftConfigMixin) for each in dataclasses.fields(base)}
    return {each.name for each in dataclasses.fields(kind) if each.init} - inherited - {"init_weights", "manifest"}


@pytest.mark.parametrize("kind", FIELDS)
def test_no_field_is_forgotten(kind):
    assert issubclass(kind, MethodConfig) and set(FIELDS[kind]) == _names(kind)


def drawn(kind: type, count: int):
    """Run a test on combinations of a configuration's fields, always the same ones."""
    combinations = st.fixed_dictionaries({}, optional={**FIELDS[kind], **SHARED})
    limits = settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    return lambda test: limits(given(combinations)(test))()


def refused_by_name(error: Exception, names) -> bool:
    return any(name in str(error) for name in names)


@pytest.mark.parametrize("kind", FIELDS)
def test_values_of_any_kind_are_taken_or_refused_by_name(kind, cases):
    anything = st.dictionaries(of(*FIELDS[kind], *SHARED), JUNK, max_size=3)

    @settings(max_examples=10 * cases, deadline=None, derandomize=True, database=None)
    @given(anything)
    def build(values):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                kind(**values)
        except (ValueError, TypeError) as error:
            assert refused_by_name(error, values), f"{values} -> {type(error).__name__}: {error}"

    build()


@pytest.mark.parametrize("kind", FIELDS)
def test_combinations_compute_or_are_refused_by_name(kind, cases):
    refused = set()

    @drawn(kind, cases)
    def build(values):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config = kind(task_type="CAUSAL_LM", **values)
                torch.manual_seed(0)
                model = get_peft_model(small(), config)
                loss = model(input_ids=IDS, labels=IDS).loss
        except (ValueError, TypeError) as error:
            names = [name for name in FIELDS[kind] if name in str(error)]
            assert names, f"{values} -> {type(error).__name__}: {error}"
            refused.add(names[0])
        else:
            assert torch.isfinite(loss), values

    assert len(refused) < len(FIELDS[kind])
