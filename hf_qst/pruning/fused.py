"""Decoder blocks of pruned models that run two kernels where the library launches many.

A pruned block of the sequential pre-norm form computes, with the index `i` of the channels that a branch reads and the
index `o` of those that it writes,

    h' = h + P_o(attention(norm_1(h)[i_1]) W_1 + b_1),      h'' = h' + P_o(mlp(norm_2(h')[i_2]) W_2 + b_2)

where `P_o` puts narrow channels to their places and zeros elsewhere. Twice a norm with a selection is one kernel
(`norm_index_select`) and the branch's last product with the addition another (`linear_index_add`), each of the four where
the rule of `hf_qst_kernels.dispatch` says that its kernel wins for this many rows. Elsewhere, and always while gradients
are on, the block's own forward runs.

Only the blocks of Llama, Mistral, Qwen2 and Qwen3 have this form to the letter. A second norm on the branch's output
(Gemma) comes between product and addition; blocks with one addition for both branches (Phi, GPT-NeoX), with dropout
before it (GPT-2, OPT) or with a product that is `Conv1D` (GPT-2) stay as they are.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

import torch
from torch import nn

from hf_qst.base_model.bare_calls import are_plain, is_bare, nobody_looks_on
from hf_qst.pruning.branch import PrunedBranch
from hf_qst_kernels.dispatch import runs_triton

_PREFIXES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
_SOURCES = {f"{prefix}DecoderLayer": f"transformers.models.{t}.modeling_{t}" for t, prefix in _PREFIXES.items()}
# Its hooks take an attention's weights, which is not what is put off here, and stay once hidden states were asked for.
_RECORDER = "transformers.utils.output_capturing"

# Their last layers, whose output is theirs.
_LAST = {"Attention": "o_proj", "MLP": "down_proj"}

_put_off = threading.local()


class DeferrableLinear(nn.Linear):
    """A linear layer that hands on its input while this thread has put it off, for a kernel to multiply later."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features], or the input itself."""
        if torch.compiler.is_compiling() or getattr(_put_off, "layer", None) is not self:
            return super().forward(input)
        _put_off.input = input
        return input

    def _get_name(self) -> str:
        return "Linear"


def fuse_blocks(model: nn.Module) -> None:
    """Give the blocks of a pruned model, of the types named above, the forward that may use the kernels.

    They become instances of a subclass of the same name. All of them do, also one that kept every channel: FSDP and
    accelerate look for blocks by one class. Tensors and their names stay as they are.
    """
    for module in model.modules():
        if _SOURCES.get(type(module).__name__) == type(module).__module__:
            module.__class__ = _fused_class(type(module))


@functools.cache
def _fused_class(plain: type[nn.Module]) -> type[nn.Module]:
    class FusedBlock(plain):
        plain_class = plain

        @functools.wraps(plain.forward)  # others read its signature and its source
        def forward(
            self,
            hidden_states,
            attention_mask=None,
            position_ids=None,
            past_key_values=None,
            use_cache=False,
            position_embeddings=None,
            **kwargs,
        ):
            kwargs |= {
                "attention_mask": attention_mask,
                "position_ids": position_ids,
                "past_key_values": past_key_values,
                "use_cache": use_cache,
                "position_embeddings": position_embeddings,
            }
            halves = _halves(self, plain, hidden_states)
            if halves is None:
                return super().forward(hidden_states, **kwargs)
            attention, mlp = halves
            between = _through(attention, hidden_states, lambda m, h: m(hidden_states=h, **kwargs), inplace=False)
            # Nobody else holds what lies between the two additions, unless a hook on the norm kept it.
            return _through(mlp, between, lambda m, h: m(h), inplace=is_bare(mlp.norm))

    FusedBlock.__name__ = FusedBlock.__qualname__ = plain.__name__
    return FusedBlock


def __getattr__(name: str) -> type:
    """The blocks' classes, which are made when they are needed: pickle looks them up here by name."""
    if name in _SOURCES:
        return _fused_class(getattr(import_module(_SOURCES[name]), name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _ops() -> tuple:
    """The modules of the two ops. Not imported above: that registers their operators, which takes 40 ms."""
    from hf_qst_kernels import linear_add, norm_select

    return norm_select, linear_add


class _Half(NamedTuple):
    """A norm, its branch, and which of the two kernels run there."""

    norm: nn.Module
    branch: nn.Module
    selects: bool
    projection: nn.Linear | None  # whose product is added by the kernel


def _halves(block: nn.Module, plain: type, hidden: torch.Tensor) -> tuple[_Half, _Half] | None:
    """The two halves of the block, or None where no kernel runs in either."""
    if (
        torch.is_grad_enabled()
        or block.training
        or not (runs_triton("norm_index_select", hidden) or runs_triton("linear_index_add", hidden))
        or not nobody_looks_on(hidden)
        or not are_plain(hidden.dtype, hidden)
    ):
        return None
    # Here and below the dictionaries of modules and not their attributes, which take ten times as long to find: while a
    # model decodes, this runs for each block and token.
    inside = block._modules
    first = _half(inside["input_layernorm"], inside["self_attn"], plain, "Attention", hidden)
    second = _half(inside["post_attention_layernorm"], inside["mlp"], plain, "MLP", hidden)
    return (first, second) if any(half.selects or half.projection is not None for half in (first, second)) else None


def _half(norm: nn.Module, branch: nn.Module, plain: type, kind: str, hidden: torch.Tensor) -> _Half:
    if type(branch) is not PrunedBranch or not is_bare(branch):
        return _Half(norm, branch, False, None)
    return _Half(norm, branch, _selects(norm, branch, plain, hidden), _added(branch, plain, kind, hidden))


def _selects(norm: nn.Module, branch: PrunedBranch, plain: type, hidden: torch.Tensor) -> bool:
    """Whether the norm and the selection of its channels are one kernel."""
    norm_select, _ = _ops()
    index, weight = branch._buffers["input_index"], norm._parameters.get("weight")
    return (
        index is not None
        and weight is not None
        and _is_own(norm, plain, "RMSNorm")
        and is_bare(norm)
        and are_plain(hidden.dtype, weight)
        and runs_triton("norm_index_select", hidden, norm_select.table_sizes(hidden, index))
    )


def _added(branch: PrunedBranch, plain: type, kind: str, hidden: torch.Tensor) -> nn.Linear | None:
    """The branch's last linear layer, if its product and the addition are one kernel."""
    _, linear_add = _ops()
    module, index = branch._modules["module"], branch._buffers["output_index"]
    if index is None or not _is_own(module, plain, kind) or not _shows_its_output_to_nobody(module):
        return None
    projection = module._modules[_LAST[kind]]
    if type(projection) not in (nn.Linear, DeferrableLinear) or not is_bare(projection):
        return None
    weight, bias = projection._parameters.get("weight"), projection._parameters.get("bias")
    if weight is None or not are_plain(hidden.dtype, weight, bias):
        return None
    sizes = linear_add.table_sizes(hidden.numel() // hidden.shape[-1], *weight.shape)
    return projection if runs_triton("linear_index_add", hidden, sizes) else None


def _is_own(module: nn.Module, plain: type, kind: str) -> bool:
    """Whether `module` is the architecture's own of this kind, and nobody exchanged its class's forward."""
    own = type(module)
    return own.__name__.endswith(kind) and own.__module__ == own.forward.__module__ == plain.__module__


def _shows_its_output_to_nobody(module: nn.Module) -> bool:
    if "forward" in module.__dict__:
        return False
    hooks = module._forward_hooks  # nearly always empty
    return not hooks or all(getattr(hook, "__module__", None) == _RECORDER for hook in hooks.values())


def _through(half: _Half, hidden: torch.Tensor, call: Callable, inplace: bool) -> torch.Tensor:
    """`hidden` [batch, seq, dim] plus the branch's output; with `inplace`, the kernel may add to `hidden` itself.

    `call(module, inputs)` calls the branch, or the module inside, as the block does.
    """
    norm, branch, selects, projection = half
    if not selects and projection is None:
        return hidden + _first(call(branch, norm(hidden)))
    norm_select, linear_add = _ops()
    if selects:
        narrow = norm_select.norm_index_select(hidden, norm.weight, None, branch.input_index, norm.variance_epsilon)
    else:
        narrow = branch.pick_out(norm(hidden))
    if projection is None:
        return hidden + branch.put_back(_first(call(branch.module, narrow)))
    unprojected, put_off = _without(projection, lambda: _first(call(branch.module, narrow)))
    if not put_off:
        return hidden + branch.put_back(unprojected)
    return linear_add.linear_index_add(
        unprojected, projection.weight, projection.bias, branch.output_index, hidden, inplace
    )


def _without(projection: nn.Linear, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, bool]:
    """What `run` returns if `projection`, the last layer in it, is left out, and whether it was.

    It is not where what `run` calls was compiled by itself (`module.compile()`): that code multiplies at once.
    """
    if type(projection) is nn.Linear:
        # Not before it is needed: what exchanges layers by their exact class finds `nn.Linear` until then.
        projection.__class__ = DeferrableLinear
    _put_off.layer, _put_off.input = projection, None
    try:
        output = run()
        given = _put_off.input
    finally:
        _put_off.layer = _put_off.input = None
    if given is not None and output is not given:
        raise RuntimeError(
            "an attention or MLP does not return what its last linear layer returns, so that hf_qst's fused block cannot "
            "run it; run the model under hf_qst_kernels.use_backend('torch')"
        )
    return output, given is not None


def _first(output: torch.Tensor | tuple) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
