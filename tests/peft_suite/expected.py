"""PEFT's tests that are expected to fail, with a reason each. One that passes fails the run.

A key is a test's name, or its name and a part of its parameters: "test_merge_layers[opt]" is that of the OPT model.
"""

_MERGES = "a side network cannot be merged into the base's weights; QST says so in one typed error"
_COMPRESSED = "the start is a compression: it differs from the base unless ranks are full"

FAILURES: dict[str, dict[str, str]] = {
    "QST": dict.fromkeys(
        ["test_merge_layers", "test_merge_layers_multi", "test_merge_layers_nan", "test_merge_layers_fp16"], _MERGES
    ),
    "MIXED_RANK": {
        "test_from_pretrained_config_construction": "the model keeps a copy of the configuration, which holds its ranks, "
        "so that one configuration serves several models",
        "test_disable_adapters[low mixed rank]": _COMPRESSED,
        "test_disable_adapters_with_merging[low mixed rank]": _COMPRESSED,
    },
}


def failures(method: str) -> dict[str, str]:
    """Those of the method with this name."""
    return FAILURES.get(method, {})
