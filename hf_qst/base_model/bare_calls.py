"""When a kernel may stand in for modules: where calling them runs their `forward` and nothing else.

A module's hooks, a `forward` of its own that accelerate or a kernel library gave it, autocast, a compiler and a trace all
see less, or something else, once a kernel is called in the module's place. Where there is one, the modules are called.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules import module as _module

from hf_qst_kernels.dispatch import every_operation_counts, runs_triton

_PLAIN = (torch.Tensor, nn.Parameter)
_simulated = False


@contextmanager
def stands_for_plain_tensors() -> Iterator[None]:
    """Inside, tensors without values count as plain ones: a plan takes the path that the real run will take."""
    global _simulated
    before, _simulated = _simulated, True
    try:
        yield
    finally:
        _simulated = before


def kernel_replaces(op: str, sizes: Mapping[str, int] | None, hidden: torch.Tensor, *modules: nn.Module) -> bool:
    """
    Whether a kernel is to compute what calling `modules` would: it wins, and the calls would do nothing else.

    Args:
        op (`str`): name of the op of `hf_qst_kernels`.
        sizes (`Mapping[str, int]`, *optional*): of the call, by `hf_qst_kernels.decisions`.
        hidden (`torch.Tensor`): the op's main input.
        modules: those that the kernel replaces.
    """
    return (
        runs_triton(op, hidden, sizes)
        and not torch.is_autocast_enabled(hidden.device.type)
        and are_bare(hidden, *modules)
    )


def are_bare(hidden: torch.Tensor, *modules: nn.Module) -> bool:
    """
    Whether calling the modules with `hidden` runs the `forward` of their classes on plain tensors, and nothing sees it.

    Plain are tensors of `hidden`'s dtype, with memory, and of no subclass (sharded, quantised, fake).
    """
    if torch.compiler.is_compiling() or _module._has_any_global_hook():
        return False
    if every_operation_counts() and not _simulated:
        return False
    tensors = [hidden]
    for module in modules:
        if not is_bare(module):
            return False
        tensors += module._parameters.values()
    plain = all(t is None or _simulated or (type(t) in _PLAIN and not t.is_meta) for t in tensors)
    return plain and all(t is None or t.dtype == hidden.dtype for t in tensors)


def is_bare(module: nn.Module) -> bool:
    """Whether calling `module` runs the `forward` of its class and no hook of its own."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )
