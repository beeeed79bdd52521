"""PEFT's tests of decoder models, with our configurations and tiny local models."""

from tests.peft_suite import base_models, configurations, peft_tests

_peft = peft_tests.load("test_decoder_models")
# The parameters of the tests refer to these lists.
_peft.ALL_CONFIGS[:] = configurations.DECODERS
_peft.PEFT_DECODER_MODELS_TO_TEST[:] = base_models.STAND_INS
# These skip models that other methods cannot handle, without asking which method it is.
_peft.check_beft_config = lambda config_cls, model_id, config_kwargs: None
_common = peft_tests.load("testing_common")
_common._skip_if_conv1d_not_supported = lambda model_id, config_cls, config_kwargs: None

TestDecoderModels = _peft.TestDecoderModels
