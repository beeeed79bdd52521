"""PEFT's tests that are expected to fail, with a reason each. One that passes fails the run.

A key is a test's name, or its name and a part of its parameters: "test_merge_layers[opt]" is that of the OPT model.
"""

from tests.conformance.methods import LINES

MERGING = ["test_merge_layers", "test_merge_layers_multi", "test_merge_layers_nan", "test_merge_layers_fp16"]
_COMPRESSED = "the start is a compression: it differs from the base unless ranks are full"

FAILURES: dict[str, dict[str, str]] = {
    "MIXED_RANK": {
        "test_from_pretrained_config_construction": "the model keeps a copy of the configuration, which holds its ranks, "
        "so that one configuration serves several models",
        "test_disable_adapters[low mixed rank]": _COMPRESSED,
        "test_disable_adapters_with_merging[low mixed rank]": _COMPRESSED,
    },
}


def failures(method: str) -> dict[str, str]:
    """Those of the method with this name; what its line of conformance refuses is among them."""
    line = next(line for line in LINES.values() if line.config_class.method == method)
    error = line.refuses.get("merge_and_unload")
    refused = {} if error is None else dict.fromkeys(MERGING, f"merging is refused with {error.__name__}")
    return {**FAILURES.get(method, {}), **refused}
