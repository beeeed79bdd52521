"""PEFT's tests of custom models, with mixed rank: the only method of ours that does not need a decoder."""

from tests.peft_suite import configurations, peft_tests

_peft = peft_tests.load("test_custom_models")
# The parameters of the tests refer to these lists.
_peft.TEST_CASES[:] = configurations.CUSTOM
_peft.ALL_PEFT_CONFIG_CLASSES[:] = [configurations.MixedRankConfig]
_peft.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = configurations.TWO_ADAPTERS

TestPeftCustomModel = _peft.TestPeftCustomModel
TestMultipleActiveAdapters = _peft.TestMultipleActiveAdapters
TestRequiresGrad = _peft.TestRequiresGrad
