"""The two ways into an op: an operator of `torch.library`, and the same function called by itself.

A compiler, a trace and a tensor subclass must see one node, which is what the operator is for. Its Python wrappers cost
from ten times what the op launches (without gradients) to a millisecond and more (with them), so an ordinary call in
eager mode passes it by: straight to the implementation, or through an `autograd.Function` made of the same two functions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from .dispatch import every_operation_counts

# What is not a subclass that traces, fakes or wraps.
_PLAIN = (torch.Tensor, torch.nn.Parameter)


class Operator:
    """
    An op of this package.

    Args:
        name (`str`): of the operator, `hf_qst::<name>`.
        implementation (`Callable`): the op, annotated as `torch.library.custom_op` asks for.
        mutates_args: names of the arguments that it writes to.
    """

    def __init__(self, name: str, implementation: Callable, mutates_args=()):
        self.implementation = implementation
        self.library = torch.library.custom_op(f"hf_qst::{name}", implementation, mutates_args=mutates_args)
        self._function = None
        self._name = name
        self._written = [i for i, p in enumerate(inspect.signature(implementation).parameters) if p in mutates_args]

    def register_fake(self, fake: Callable) -> Callable:
        """Shapes and dtypes of the results, as `torch.library` asks for."""
        return self.library.register_fake(fake)

    def register_autograd(self, backward: Callable, setup_context: Callable) -> None:
        """Both functions as `torch.library` asks for, which are also those of an `autograd.Function`."""
        self.library.register_autograd(backward, setup_context=setup_context)
        self._function = type(
            f"hf_qst_{self._name}",
            (torch.autograd.Function,),
            {
                "forward": staticmethod(self.implementation),
                "setup_context": staticmethod(setup_context),
                "backward": staticmethod(once_differentiable(backward)),
            },
        )

    def __call__(self, *args):
        if not _is_eager(args):
            return self.library(*args)
        if not (torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)):
            result = self.implementation(*args)
            for i in self._written:
                if not args[i].is_inference():
                    torch.autograd.graph.increment_version(args[i])  # torch does, a Triton kernel does not
            return result
        if self._function is None or every_operation_counts():
            return self.library(*args)
        return self._function.apply(*args)


def _is_eager(args: tuple) -> bool:
    """Whether these tensors are not traced: they are plain, with memory, and no compiler is at work."""
    if torch.compiler.is_compiling():
        return False
    return all(type(a) in _PLAIN and not a.is_meta for a in args if isinstance(a, torch.Tensor))


def operator(name: str, mutates_args=()) -> Callable[[Callable], Operator]:
    """`Operator` as a decorator."""
    return lambda implementation: Operator(name, implementation, mutates_args)
