"""When a kernel may stand in for modules: where calling them runs their `forward` and nothing besides.

A module's hooks, a `forward` of its own that accelerate or a kernel library gave it, and autocast all see less, or something
else, once a kernel is called in its place. Where one of them is there, the modules are called as ever.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules import module as _module

_PLAIN = (torch.Tensor, nn.Parameter)


def is_bare(module: nn.Module) -> bool:
    """Whether calling `module` runs the `forward` of its class and no hook of its own."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def nobody_looks_on(inputs: torch.Tensor) -> bool:
    """Whether modules given `inputs` are called outside autocast, and without hooks on all modules at once.

    That nothing is compiled or traced is part of the rule of `hf_qst_kernels.dispatch`.
    """
    return not torch.is_autocast_enabled(inputs.device.type) and no_global_hooks()


def no_global_hooks() -> bool:
    """Whether there are no hooks on all modules at once."""
    return not _module._has_any_global_hook()


def are_plain(dtype: torch.dtype, *tensors: torch.Tensor | None) -> bool:
    """Whether all are of this dtype and none is of a subclass (sharded, quantised, fake) or without memory."""
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.dtype != dtype or tensor.is_meta):
            return False
    return True
