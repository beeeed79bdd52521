"""The lists of expected failures name tests that exist."""

import pytest

from tests.peft_suite import expected_disp, expected_mixed_rank, expected_qst, peft_tests


@pytest.mark.parametrize("module", [expected_qst, expected_disp, expected_mixed_rank])
def test_every_expected_failure_names_a_test_of_peft(module):
    decoders, custom = peft_tests.load("test_decoder_models"), peft_tests.load("test_custom_models")
    classes = (decoders.TestDecoderModels, custom.TestPeftCustomModel, custom.TestMultipleActiveAdapters)
    names = {name for owner in (*classes, custom.TestRequiresGrad) for name in dir(owner)}
    assert {key.partition("[")[0] for key in module.EXPECTED} <= names
