"""Checks that a model is what its config would be built to, before it is saved under that config."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_qst.reshaped_models.kinds import ReshapedModelError

CLASS_PREFIX = "Reshaped"


def require_rebuilt(model: PreTrainedModel, model_class: type, config: PreTrainedConfig) -> None:
    """Compare `model` with `model_class(config)`, which takes no memory: what a saved folder would come back as."""
    config = copy.deepcopy(config)
    if isinstance(config.dtype, str):  # as a saved one has it; from_pretrained takes it by its name too
        config.dtype = getattr(torch, config.dtype)
    try:
        with torch.device("meta"):
            twin = model_class(config)
    except TypeError as error:
        raise ReshapedModelError(
            f"{model_class.__name__.removeprefix(CLASS_PREFIX)} cannot be built from its config alone, as from_pretrained "
            f"does: {error}"
        ) from error
    if getattr(model, "hf_quantizer", None) is None:  # packed weights have shapes of their own
        _require_tensors(model, twin)
    _require_classes(model, twin)


def _require_tensors(model: PreTrainedModel, twin: PreTrainedModel) -> None:
    expected = {name: list(tensor.shape) for name, tensor in twin.state_dict().items()}
    found = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted({*expected, *found}):
        if expected.get(name) != found.get(name) and not (name not in found and _is_left_out(model, name)):
            raise ReshapedModelError(
                f"tensor {name!r} of the model has shape {found.get(name)}, {type(twin).__name__} built from its "
                f"config has {expected.get(name)}"
            )


def _require_classes(model: PreTrainedModel, twin: PreTrainedModel) -> None:
    """Compare what computes with the tensors: a module of another class would come back as the architecture's."""
    inside = tuple(f"{path}." for path in getattr(twin.config, "reshaped_modules", ()))
    prefix = "" if twin.base_model is twin else f"{twin.base_model_prefix}."
    quantised = getattr(model, "hf_quantizer", None) is not None
    modules = dict(model.named_modules())
    for name, expected in twin.named_modules():
        if not name or f"{name.removeprefix(prefix)}.".startswith(inside):
            continue  # the model's own class is about to change; a kind answers for what is inside its modules
        if (quantised and isinstance(expected, (nn.Linear, Conv1D))) or _is_left_out(model, f"{name}."):
            continue
        found, wanted = _class_of(modules.get(name)), _class_of(expected)
        if found is not wanted:
            raise ReshapedModelError(
                f"module {name!r} of the model is of class {found.__module__}.{found.__qualname__}, "
                f"{type(twin).__name__} built from its config has {wanted.__module__}.{wanted.__qualname__} there, so a "
                "saved model would compute something else; make the module in the __init__ of a subclass of "
                f"{type(twin).__name__.removeprefix(CLASS_PREFIX)}"
            )


def _class_of(module: nn.Module | None) -> type:
    """The class that a module is made of: torch gives one with a parametrization (weight norm) a class of its own."""
    kind = type(module)
    kind = getattr(kind, "plain_class", kind)
    return kind.__mro__[1] if module is not None and is_parametrized(module) else kind


def _is_left_out(model: nn.Module, name: str) -> bool:
    """Whether a tensor's module is None: a pooler that was not asked for (`add_pooling_layer=False`) is not saved."""
    module = model
    for part in name.split(".")[:-1]:
        if not hasattr(module, part):
            return False
        module = getattr(module, part)
        if module is None:
            return True
    return False
