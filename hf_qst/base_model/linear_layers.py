"""Linear layers of transformers, plain and quantised, in one orientation: y = x W + b with W [d_in, d_out]."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers.pytorch_utils import Conv1D


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a dense layer: `nn.Linear` (quantised too) or GPT-2's `Conv1D`."""
    return isinstance(module, (nn.Linear, Conv1D))


def dense_weight(module: nn.Module) -> torch.Tensor:
    """The weight W [d_in, d_out] of y = x W + b; a quantised one is dequantised."""
    if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
        # bitsandbytes' functions would read the packed layout as the usual one; the layer itself knows.
        rows = torch.eye(module.in_features, dtype=float_dtype(module))
        with torch.no_grad():
            return module(rows) if module.bias is None else module(rows) - module.bias
    if type(module.weight).__name__ == "Int8Params":
        # PEFT's function would leave a layer that has run without its scales.
        scales = module.state.SCB if module.weight.SCB is None else module.weight.SCB
        return (module.weight.detach().float() * (scales.float() / 127)[:, None]).to(float_dtype(module)).T
    weight = dequantize_module_weight(module).detach()
    return weight if isinstance(module, Conv1D) else weight.T


def dense_shape(module: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a linear layer."""
    return in_features(module), module.out_features if hasattr(module, "out_features") else module.nf


def float_dtype(module: nn.Module) -> torch.dtype:
    """The dtype a layer computes in; that of a quantised one is its compute type."""
    if module.weight.is_floating_point():
        return module.weight.dtype
    return getattr(module, "compute_dtype", None) or torch.get_default_dtype()


def in_features(module: nn.Module) -> int:
    """Input width of a linear layer, also of a `Conv1D` of GPT-2."""
    return module.in_features if hasattr(module, "in_features") else module.nx


def weight_count(model: nn.Module, without: Iterable[torch.Tensor] = ()) -> int:
    """Parameters of a model but for those of `without`; a quantised weight counts with its shape before packing."""
    packed = {id(module.weight): module for module in model.modules() if is_linear(module)}
    left_out = {id(parameter) for parameter in without}
    count = 0
    for parameter in model.parameters():
        if id(parameter) in left_out:
            continue
        module = packed.get(id(parameter))
        count += parameter.numel() if module is None else dense_shape(module)[0] * dense_shape(module)[1]
    return count


def empty_linear(inputs: int, outputs: int, bias: bool, conv1d: bool, dtype: torch.dtype, device) -> nn.Module:
    """A `Linear`, or a `Conv1D`, of this size that is not initialised: that would draw random numbers."""
    with torch.device("meta"):
        linear = Conv1D(outputs, inputs) if conv1d else nn.Linear(inputs, outputs, bias=bias)
    linear = linear.to(dtype)
    return linear if torch.device(device).type == "meta" else linear.to_empty(device=device)


def set_weights(linear: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Give a linear layer the weight W [d_in, d_out] and the bias [d_out]."""
    with torch.no_grad():
        linear.weight.copy_(weight if isinstance(linear, Conv1D) else weight.T)
        if bias is not None:
            linear.bias.copy_(bias)
