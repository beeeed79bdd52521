"""Our configurations in the place of PEFT's in the parameters of PEFT's tests."""

from hf_qst import DISPConfig, MixedRankConfig, QSTConfig

MIXED_RANK = {"keep_base_weights": True, "progress": False}
METHODS = (QSTConfig, DISPConfig, MixedRankConfig)

# (configuration, arguments) of decoder models.
DECODERS = [
    (QSTConfig, {"task_type": "CAUSAL_LM", "r": 4, "downsample_rank": 4}),
    (DISPConfig, {"task_type": "CAUSAL_LM"}),
    (MixedRankConfig, {"task_type": "CAUSAL_LM", **MIXED_RANK}),
]

# (name of the test, PEFT's model, configuration, arguments). Rank 2 of 10 x 20 and 1 of 20 x 2.
CUSTOM = [
    (f"{name} mixed rank", model, MixedRankConfig, {**arguments, **MIXED_RANK})
    for name, model, arguments in (
        ("Vanilla MLP 1", "MLP", {"target_modules": "lin0"}),
        ("Vanilla MLP 2", "MLP", {"target_modules": ["lin0"]}),
        ("Vanilla MLP 3", "MLP", {"target_modules": ["lin1"], "keep_ratio": 0.6}),
        ("Vanilla MLP 4", "MLP", {"target_modules": ["lin0", "lin1"]}),
        ("Vanilla MLP 5", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
        ("Embedding + transformers Conv1D 1", "EmbConv1D", {"target_modules": ["conv1d"]}),
        ("Conv2d 1", "Conv2d", {"target_modules": ["lin0"]}),
    )
]

# (name, tuner, configuration, arguments of the first adapter, of the second), on PEFT's MLP.
TWO_ADAPTERS = [
    (
        f"Mixed rank {name}",
        "mixed_rank",
        MixedRankConfig,
        {"target_modules": ["lin0"], "init_weights": False, **MIXED_RANK},
        {"target_modules": [second], "init_weights": False, "keep_ratio": 0.6, **MIXED_RANK},
    )
    for name, second in (("Same", "lin0"), ("Different", "lin1"))
]
