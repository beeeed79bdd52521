"""PEFT's tests that are expected to fail, with a reason each. One that passes fails the run.

A key is a test's name, or its name and a part of its parameters: "test_merge_layers[opt]" is that of the OPT model.
"""

_MERGES = "a side network cannot be merged into the base's weights; QST says so in one typed error"

EXPECTED: dict[str, str] = {
    "test_merge_layers": _MERGES,
    "test_merge_layers_multi": _MERGES,
    "test_merge_layers_nan": _MERGES,
    "test_merge_layers_fp16": _MERGES,
}
