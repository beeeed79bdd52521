"""Decoder blocks of pruned models that run two kernels where the library launches many.

A pruned block of the sequential pre-norm form computes, with the index `i` of the channels that a branch reads and the
index `o` of those that it writes,

    h' = h + P_o(attention(norm_1(h)[i_1]) W_1 + b_1),      h'' = h' + P_o(mlp(norm_2(h')[i_2]) W_2 + b_2)

where `P_o` puts narrow channels to their places and zeros elsewhere. Each norm with its selection is one kernel
(`norm_index_select`), and each branch's last product with the addition another (`linear_index_add`). Each of the four
runs where it was measured to win for this many rows, and only without gradients; elsewhere the block's own forward runs.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

import torch
from torch import nn

import hf_qst_kernels
from hf_qst.base_model.bare_calls import is_bare, kernel_replaces
from hf_qst.base_model.block_calls import hidden_of
from hf_qst.base_model.decoder_stack import ARCHITECTURES, Architecture
from hf_qst.pruning.branch import PrunedBranch
from hf_qst_kernels import break_even
from hf_qst_kernels.decisions import linear_index_add_sizes, norm_index_select_sizes

# By the name of the block's class: model type and row of the architectures whose blocks have this form to the letter.
_BLOCKS = {row.sequential.block: (name, row) for name, row in ARCHITECTURES.items() if row.sequential is not None}
# Its hooks read an attention's weights, which stay the same, and remain once hidden states were asked for.
_RECORDER = "transformers.utils.output_capturing"

_deferred = threading.local()


def use_kernels(model: nn.Module, enabled: bool = True) -> nn.Module:
    """
    Let the blocks of a pruned model run the kernels, or with `enabled=False` give them their own forward back.

    Needed once, after the model was moved to its GPU. A model that is pruned or loaded on a GPU with a table of measured
    times has it already. The blocks become instances of a subclass of the same name; tensors and their names stay, and
    a second call changes nothing.

    Args:
        model (`nn.Module`): a pruned model, bare or wrapped, with blocks of Llama, Mistral, Qwen2 or Qwen3.

    Returns:
        The same model.

    Raises:
        ValueError: none of its blocks has a pruned branch and one of these forms.
    """
    if not enabled:
        for module in model.modules():
            if type(module).__module__ == __name__:
                module.__class__ = type(module).plain_class
    elif not _attach(model):
        kinds = ", ".join(sorted(_BLOCKS))
        raise ValueError(f"use_kernels takes a pruned model with blocks of {kinds}, got {type(model).__name__}")
    return model


def use_kernels_where_measured(model: nn.Module) -> None:
    """`use_kernels` for a model on a GPU whose table of measured times exists; any other stays as it is."""
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    if any(map(break_even.has_table, devices)):
        _attach(model)


def _attach(model: nn.Module) -> bool:
    """Whether there are pruned blocks of these forms; then all blocks have their new class."""
    plain = [module for module in model.modules() if type(module).__module__ == _source(type(module).__name__)]
    fused = [module for module in model.modules() if isinstance(module, _Fused)]
    if not any(isinstance(part, PrunedBranch) for block in plain + fused for part in block.children()):
        return False
    for block in plain:  # those that kept every channel as well: FSDP and accelerate look for blocks by one class
        block.__class__ = _fused_class(type(block))
    return True


def _source(name: str) -> str:
    """The module of transformers that a block's class of this name comes from; `""` for any other name."""
    model_type = _BLOCKS[name][0] if name in _BLOCKS else ""
    return model_type and f"transformers.models.{model_type}.modeling_{model_type}"


class DeferrableLinear(nn.Linear):
    """A linear layer that returns its input while this thread has deferred it, for a kernel to multiply later."""

    plain_class = nn.Linear

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features], or the input itself."""
        if torch.compiler.is_compiling() or getattr(_deferred, "layer", None) is not self:
            return super().forward(input)
        _deferred.input = input
        return input

    def _get_name(self) -> str:
        return "Linear"


class _Fused:
    """Marks the classes that `_fused_class` makes."""


@functools.cache
def _fused_class(plain: type[nn.Module]) -> type[nn.Module]:
    row = _BLOCKS[plain.__name__][1]

    class FusedBlock(_Fused, plain):
        plain_class = plain

        @functools.wraps(plain.forward)  # others read its signature and its source
        def forward(self, hidden_states, *args, **kwargs):
            if args or torch.compiler.is_compiling() or torch.is_grad_enabled() or self.training:
                return super().forward(hidden_states, *args, **kwargs)
            attention, mlp = _halves(self, row, hidden_states)
            if not (attention.fuses or mlp.fuses):
                return super().forward(hidden_states, **kwargs)
            kwargs.setdefault("attention_mask", None)  # which an attention takes without a default
            between = _through(attention, hidden_states, lambda m, h: m(hidden_states=h, **kwargs), inplace=False)
            # Nothing else refers to the state between the two additions, unless a hook on the norm kept it.
            return _through(mlp, between, lambda m, h: m(h), inplace=is_bare(mlp.norm))

    FusedBlock.__name__ = FusedBlock.__qualname__ = plain.__name__
    return FusedBlock


def __getattr__(name: str) -> type:
    """The blocks' classes, which are made when they are needed: pickle looks them up here by name."""
    if name in _BLOCKS:
        return _fused_class(getattr(import_module(_source(name)), name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Half(NamedTuple):
    """A norm, its branch, and which of the two kernels run there."""

    norm: nn.Module
    branch: nn.Module
    selects: bool = False
    projection: nn.Linear | None = None  # whose product the kernel adds

    @property
    def fuses(self) -> bool:
        return self.selects or self.projection is not None


def _halves(block: nn.Module, row: Architecture, hidden: torch.Tensor) -> tuple[_Half, _Half]:
    # Here and below the dictionaries of modules and not their attributes, which take ten times as long to find: while a
    # model decodes, this runs for each block and token.
    inside, projections = block._modules, row.projections
    attention, mlp = row.attention, projections.mlp_hosts[0]
    first, second = (inside[name] for name in row.sequential.norms)
    return (
        _half(
            first, inside[attention], type(block).plain_class, projections.attention_out[len(attention) + 1 :], hidden
        ),
        _half(second, inside[mlp], type(block).plain_class, projections.mlp_out[len(mlp) + 1 :], hidden),
    )


def _half(norm: nn.Module, branch: nn.Module, plain: type, last: str, hidden: torch.Tensor) -> _Half:
    if type(branch) is not PrunedBranch:
        return _Half(norm, branch)
    index = branch._buffers["input_index"]
    selects = (
        index is not None
        and _is_own(norm, plain)
        and norm._parameters.get("weight") is not None
        and kernel_replaces("norm_index_select", norm_index_select_sizes(hidden, index), hidden, branch, norm)
    )
    module = branch._modules["module"]
    projection = module._modules.get(last)
    if (
        branch._buffers["output_index"] is None
        or type(projection) not in (nn.Linear, DeferrableLinear)
        or projection._parameters.get("weight") is None
        or not (_is_own(module, plain) and _hides_its_output(module))
        or not kernel_replaces(
            "linear_index_add",
            linear_index_add_sizes(hidden.numel() // hidden.shape[-1], projection._parameters["weight"]),
            hidden,
            branch,
            projection,
        )
    ):
        projection = None
    return _Half(norm, branch, selects, projection)


def _is_own(module: nn.Module, plain: type) -> bool:
    """Whether `module` is one of the architecture's, and its class's forward was not exchanged."""
    return type(module).__module__ == type(module).forward.__module__ == plain.__module__


def _hides_its_output(module: nn.Module) -> bool:
    """Whether no hook on the module reads its output."""
    if "forward" in module.__dict__:
        return False
    hooks = module._forward_hooks  # nearly always empty
    return not hooks or all(getattr(hook, "__module__", None) == _RECORDER for hook in hooks.values())


def _through(half: _Half, hidden: torch.Tensor, call: Callable, inplace: bool) -> torch.Tensor:
    """`hidden` [batch, seq, dim] plus the branch's output; with `inplace`, the kernel may add to `hidden` itself.

    `call(module, inputs)` calls the branch, or the module inside, as the block does.
    """
    norm, branch, selects, projection = half
    if not half.fuses:
        return hidden + hidden_of(call(branch, norm(hidden)))
    if selects:
        narrow = hf_qst_kernels.norm_index_select(hidden, norm.weight, None, branch.input_index, norm.variance_epsilon)
    else:
        narrow = branch.pick_out(norm(hidden))
    if projection is None:
        return hidden + branch.put_back(hidden_of(call(branch.module, narrow)))
    output, deferred = _without(projection, lambda: hidden_of(call(branch.module, narrow)))
    if not deferred:
        return hidden + branch.put_back(output)
    return hf_qst_kernels.linear_index_add(
        output, projection.weight, projection.bias, branch.output_index, hidden, inplace
    )


def _without(projection: nn.Linear, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, bool]:
    """What `run` returns with `projection`, the last layer in it, left out, and whether it was left out.

    It is not where what `run` calls was compiled by itself (`module.compile()`): that code multiplies at once.
    """
    if type(projection) is nn.Linear:
        # Not before it is needed: what exchanges layers by their exact class finds `nn.Linear` until then.
        projection.__class__ = DeferrableLinear
    _deferred.layer, _deferred.input = projection, None
    try:
        output = run()
        given = _deferred.input
    finally:
        _deferred.layer = _deferred.input = None
    if given is not None and output is not given:
        raise RuntimeError(
            "an attention or MLP does not return what its last linear layer returns, so that hf_qst's fused block cannot "
            "run it; give its model the plain blocks back with hf_qst.pruning.use_kernels(model, enabled=False)"
        )
    return output, given is not None
