"""Names of a saved model's tensors: those in its files, and those that the model has in memory."""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from hf_qst.saved.manifest import CheckpointError


def names_in_memory(model_class: type[PreTrainedModel], config: PreTrainedConfig, tensors: set[str]) -> set[str]:
    """Names of the files' tensors as transformers renames them on loading: Nemotron-H's base is `backbone` in files.

    Raises:
        CheckpointError:
            The class calls its base model otherwise than the files do, and would find none of the tensors. The message
            names both.
    """
    conversions = get_checkpoint_conversion_mapping(model_class.__name__)
    if conversions is None:
        conversions = get_checkpoint_conversion_mapping(config.model_type)
    renamings = [conversion for conversion in conversions or () if isinstance(conversion, WeightRenaming)]
    names = {rename_source_key(name, renamings, [])[0] for name in tensors}
    own = f"{model_class.base_model_prefix}."
    inside = tuple(f"{path}." for path in config.reshaped_modules)
    found = {name.partition(".")[0] for name in names if name.partition(".")[2].startswith(inside)}
    if found and not any(name.startswith((own, *inside)) for name in names):
        raise CheckpointError(
            f"the files call the base model {min(found)!r}, {model_class.__name__} calls it "
            f"{model_class.base_model_prefix!r} and would start from random values"
        )
    return names
