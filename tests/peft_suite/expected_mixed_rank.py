"""PEFT's tests that are expected to fail, with a reason each. One that passes fails the run.

A key is a test's name, or its name and a part of its parameters: "test_merge_layers[opt]" is that of the OPT model.
"""

EXPECTED: dict[str, str] = {}
