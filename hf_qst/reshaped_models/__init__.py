"""Models some of whose modules have other shapes than their architecture's: one way to save, load and undo them.

Importing this package registers them with transformers' Auto classes.
"""

from hf_qst.base_model.experts import KIND, SplitExperts
from hf_qst.reshaped_models.classes import (
    CLASS_PREFIX,
    FORMAT,
    MODEL_TYPE,
    ReshapedConfig,
    ReshapedModel,
    registered_config_class,
    reshape_model,
    reshaped_class,
    to_dense,
)
from hf_qst.reshaped_models.expert_quantization import quantize_experts, split_experts
from hf_qst.reshaped_models.folder import MANIFEST_NAME
from hf_qst.reshaped_models.kinds import ReshapedModelError, register_kind

register_kind(KIND, SplitExperts.from_description)

__all__ = [
    "FORMAT",
    "MANIFEST_NAME",
    "MODEL_TYPE",
    "ReshapedConfig",
    "ReshapedModel",
    "ReshapedModelError",
    "quantize_experts",
    "register_kind",
    "reshape_model",
    "reshaped_class",
    "split_experts",
    "to_dense",
]


def __getattr__(name: str) -> type:
    """The reshaped classes, which are made when they are needed: pickle looks them up here by name."""
    import transformers

    kind = transformers.PreTrainedModel if name.startswith(CLASS_PREFIX) else transformers.PreTrainedConfig
    plain = None if name.startswith("_") else getattr(transformers, name.removeprefix(CLASS_PREFIX), None)
    if isinstance(plain, type) and issubclass(plain, kind):
        # A config that comes from another process is known to the Auto classes here too.
        return reshaped_class(plain) if name.startswith(CLASS_PREFIX) else registered_config_class(plain)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
