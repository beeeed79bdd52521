"""The lists of expected failures name methods and tests that exist."""

from hf_qst.tuner.registration import METHODS
from tests.peft_suite import expected, peft_tests


def test_every_expected_failure_names_a_test_of_peft():
    decoders, custom = peft_tests.load("test_decoder_models"), peft_tests.load("test_custom_models")
    classes = (decoders.TestDecoderModels, custom.TestPeftCustomModel, custom.TestMultipleActiveAdapters)
    names = {name for owner in (*classes, custom.TestRequiresGrad) for name in dir(owner)}
    assert expected.FAILURES.keys() <= METHODS.keys()
    for method in METHODS:
        assert {key.partition("[")[0] for key in expected.failures(method)} <= names
