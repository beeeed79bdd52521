"""Models whose weights are elsewhere: offloaded by accelerate (`device_map`, `cpu_offload`), divided among processes (FSDP,
ZeRO-3, tensor parallelism), or never loaded."""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor


class MissingWeightsError(ValueError):
    """A model's weights were to be read, and are not in memory."""


def has_values(tensor: torch.Tensor) -> bool:
    """Whether a tensor can be read; one on the meta device and a fake one (of a plan, a trace) have a shape alone."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this process holds a part of the tensor alone, under FSDP, ZeRO-3 or tensor parallelism."""
    if hasattr(tensor, "ds_status"):
        return tensor.ds_status.name != "AVAILABLE"
    return type(tensor.data).__name__ == "DTensor"


def require_weights(model: nn.Module, wanted_by: str, without: str = "") -> None:
    """Refuse a model some of whose weights are on the meta device or divided among processes.

    Args:
        model
        wanted_by (`str`): what reads the weights, for the message.
        without (`str`): what does the same without the model in memory, for the message.

    Raises:
        MissingWeightsError: naming a weight, and what has become of it.
    """
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise MissingWeightsError(
                f"{wanted_by} reads the model's weights, but of {name!r} each process holds a part (FSDP, ZeRO-3 or tensor "
                "parallelism). Do it before the model is divided, or with the saved model in one process"
            )
        if parameter.is_meta:
            why = (
                "the model is offloaded by accelerate (device_map or cpu_offload), which puts weights on the meta device "
                "between forward passes"
                if is_offloaded(model)
                else "it was never loaded"
            )
            raise MissingWeightsError(
                f"{wanted_by} reads the model's weights, but {name!r} is not in memory: {why}. Load the model whole, for "
                "example with device_map={'': 'cpu'}" + (without and f"; where it does not fit, {without}")
            )


def require_in_place(model: nn.Module, wanted_by: str) -> None:
    """Refuse a model that accelerate has offloaded, or whose layers are divided by channels; one that is on the meta device for
    good may be.

    Raises:
        MissingWeightsError
    """
    if (processes := getattr(model, "tp_size", None) or 1) > 1:
        raise MissingWeightsError(
            f"{wanted_by} changes single channels of layers, but the model is divided by channels among {processes} processes "
            "(tensor parallelism, tp_plan or tp_size): load it without, and divide it with FSDP where it does not fit"
        )
    if is_offloaded(model):
        require_weights(model, wanted_by)


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate brings weights of this model in for each forward pass."""
    return any(getattr(getattr(module, "_hf_hook", None), "offload", False) for module in model.modules())


def input_device(model: nn.Module) -> torch.device:
    """Where a model wants its inputs, also if its weights are offloaded."""
    device = next(model.parameters()).device
    if device.type != "meta":
        return device
    for module in model.modules():
        found = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if found is not None:
            return torch.device(found)
    return device
