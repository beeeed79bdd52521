"""Our configurations in the place of PEFT's in the parameters of PEFT's tests."""

from dataclasses import dataclass

from hf_qst import MixedRankConfig, QSTConfig
from hf_qst.tuner import registration


@dataclass
class KeptMixedRankConfig(MixedRankConfig):
    """With what PEFT's tests rely on as defaults, since some pass nothing but `target_modules`."""

    keep_base_weights: bool = True
    progress: bool = False


METHODS = [
    KeptMixedRankConfig if config_class is MixedRankConfig else config_class
    for config_class, _ in registration.METHODS.values()
]
_SMALLER = {QSTConfig: {"r": 4, "downsample_rank": 4}}

# (configuration, arguments) of decoder models.
DECODERS = [(method, {"task_type": "CAUSAL_LM", **_SMALLER.get(method, {})}) for method in METHODS]

# (name of the test, PEFT's model, configuration, arguments). Full ranks start at the base's own function, up to
# rounding, as PEFT's methods do.
CUSTOM = [
    (f"{name} mixed rank", model, KeptMixedRankConfig, arguments)
    for name, model, arguments in (
        ("MLP 1 low", "MLP", {"target_modules": "lin0"}),
        ("MLP 2 low", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
        ("MLP 3 full", "MLP", {"target_modules": ["lin0", "lin1"], "rank_pattern": {"lin0": 10, "lin1": 2}}),
        (
            "MLP 4 full",
            "MLP",
            {"target_modules": ["lin0", "lin1"], "modules_to_save": ["lin1"], "rank_pattern": {"lin0": 10}},
        ),
        ("LayerNorm low", "MLP_LayerNorm", {"target_modules": ["lin0", "lin1"]}),
        (
            "Embedding and transformers Conv1D full",
            "EmbConv1D",
            {"target_modules": "conv1d", "rank_pattern": {"conv1d": 1}},
        ),
        ("Conv2d full", "Conv2d", {"target_modules": ["lin0"], "rank_pattern": {"lin0": 2}}),
    )
]

# (name, tuner, configuration, arguments of the first adapter, of the second), on PEFT's MLP.
TWO_ADAPTERS = [
    (
        f"Mixed rank {name}",
        "mixed_rank",
        KeptMixedRankConfig,
        {"target_modules": ["lin0"], "init_weights": False},
        {"target_modules": [second], "init_weights": False, "keep_ratio": 0.6},
    )
    for name, second in (("Same", "lin0"), ("Different", "lin1"))
]
