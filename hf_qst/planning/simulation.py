"""A model whose tensors have shapes and no values, and a run of it that allocates nothing.

The modules are the real ones and their own `forward` runs, on fake tensors of torch. So what autograd keeps, which sizes
are allocated, and which operations run follow from the code that will really run, for every architecture, without a
formula for it. Where that code asks for values, or for a kernel that has no shape function, what is here stands in:

- attention: torch chooses a kernel by the device and refuses fake tensors, so the choice is made here;
- grouped products of experts: their shape function takes bfloat16 alone;
- packed sequences: transformers looks for them in the positions' values. There are none in a plan.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from hf_qst.base_model.bare_calls import stands_for_plain_tensors
from hf_qst.base_model.offloading import has_values
from hf_qst.base_model.packed_weights import forbid_packing

_aten = torch.ops.aten
# bitsandbytes: entries of a weight that share a scale, and of those scales that share another.
_BLOCK, _NESTED_BLOCK = 64, 256


class PlanError(ValueError):
    """A run that cannot be planned; the message says why."""


class Simulation:
    """A copy of a model with fake tensors, on which training steps and prompts can be run.

    Args:
        model (`nn.Module`): on any device, also on meta; wrapped by PEFT or not. It is not changed. 4-bit layers on meta
            that hold no quantised weight yet get one of the right size.
        kernels (`str`): `"cpu"` or `"cuda"`: whose attention kernels are assumed.
        padded (`bool`): whether attention masks hide something; else they count as left out.
    """

    def __init__(self, model: nn.Module, kernels: str = "cpu", padded: bool = False):
        self.mode, self.kernels, self.padded = FakeTensorMode(), kernels, padded
        self.model = self._copied(model)
        self.model.__dict__.pop("forward", None)  # a library's wrapper, which would call the model itself
        forbid_packing(self.model)

    def _copied(self, model: nn.Module) -> nn.Module:
        # Configurations are shared: one may hold batches, or a generator of them.
        memo = {id(config): config for config in getattr(model, "peft_config", {}).values()}
        for module in model.modules():
            if _is_four_bit(module):
                memo[id(module.weight)] = weight = self._packed(module)
                memo[id(getattr(module, "quant_state", None))] = weight.quant_state
        for tensor in (*model.parameters(), *model.buffers()):
            memo.setdefault(id(tensor), self.fake(tensor))
        memo.pop(id(None), None)
        with _Copying(self):
            return copy.deepcopy(model, memo)

    def fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of this shape, layout and dtype without values."""
        with self.mode:
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made

    def forget_gradients(self) -> None:
        """As an optimiser does after its step."""
        for parameter in self.model.parameters():
            parameter.grad = None

    def empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        with self.mode:
            return torch.empty(shape, dtype=dtype, device="cpu")

    def _packed(self, layer: nn.Module) -> nn.Parameter:
        """The weight of a 4-bit layer with its scales, as bitsandbytes holds them."""
        from bitsandbytes.functional import QuantState

        weight, state = layer.weight, layer.weight.quant_state
        if state is None:
            sizes, nested, dtype = (layer.out_features, layer.in_features), weight.compress_statistics, weight.dtype
            kind, storage, block = weight.quant_type, weight.quant_storage, weight.blocksize or _BLOCK
        else:
            sizes, nested, dtype = tuple(state.shape), state.nested, state.dtype
            kind, storage, block = state.quant_type, weight.dtype, state.blocksize
        count = sizes[0] * sizes[1]
        scales = -(-count // block)
        second = None
        if nested:
            second = QuantState(
                absmax=self.empty(-(-scales // _NESTED_BLOCK), dtype=torch.float32),
                code=self._table(256),
                blocksize=_NESTED_BLOCK,
                dtype=torch.float32,
            )
        packed = self.empty(-(-count // (2 * storage.itemsize)), 1, dtype=storage)
        made = nn.Parameter(packed, requires_grad=False)
        # Read by PEFT and by bitsandbytes' layer.
        made.blocksize, made.compress_statistics, made.quant_type, made.quant_storage = block, nested, kind, storage
        made.bnb_quantized, made.module = True, None
        made.quant_state = QuantState(
            absmax=self.empty(scales, dtype=torch.uint8 if nested else torch.float32),
            shape=torch.Size(sizes),
            code=self._table(16),
            blocksize=block,
            quant_type=kind,
            dtype=dtype,
            offset=self.empty(dtype=torch.float32) if nested else None,
            state2=second,
        )
        return made

    def _table(self, size: int) -> torch.Tensor:
        return self.empty(size, dtype=torch.float32)

    @contextmanager
    def running(self, autocast: torch.dtype | None = None) -> Iterator[None]:
        """Inside, the copy can be called with fake tensors.

        Args:
            autocast: dtype of the products, where the run is one under autocast.
        """
        with ExitStack() as stack:
            stack.enter_context(stands_for_plain_tensors())
            stack.enter_context(_stand_ins(self.kernels, self.padded))
            stack.enter_context(self.mode)
            stack.enter_context(_autocast(autocast, self.kernels))
            yield


@contextmanager
def _autocast(dtype: torch.dtype | None, kernels: str) -> Iterator[None]:
    """Autocast for the fake tensors, which are on a CPU; libraries that ask find it enabled on the real device."""
    before = torch.is_autocast_enabled("cuda")
    try:
        torch.set_autocast_enabled("cuda", dtype is not None and kernels == "cuda")
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            yield
    finally:
        torch.set_autocast_enabled("cuda", before)


def _is_four_bit(module: nn.Module) -> bool:
    return type(getattr(module, "weight", None)).__name__ == "Params4bit"


class _Copying(TorchFunctionMode):
    """Copies of tensors that are neither parameters nor buffers are fake too."""

    def __init__(self, simulation: Simulation):
        self.simulation = simulation

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = self.simulation.fake(tensor.detach())
            return memo[id(tensor)]
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


@contextmanager
def _stand_ins(kernels: str, padded: bool) -> Iterator[None]:
    """Puts what has a shape function in the place of what has none, for fake tensors.

    A mode of torch would not do: it is off in the backward pass, in which checkpointed blocks run again.
    """
    from transformers import masking_utils

    places = [
        (F, "scaled_dot_product_attention", partial(attention, kernels)),
        (F, "grouped_mm", grouped_product),
        (torch, "_grouped_mm", grouped_product),
        (masking_utils, "find_packed_sequence_indices", lambda position_ids: None),
    ]
    if not padded:
        skips = getattr(masking_utils, "_ignore_causal_mask_sdpa", None)
        places.append((masking_utils, "_ignore_causal_mask_sdpa", partial(_without_padding, skips)))
    own = [(module, name, getattr(module, name), other) for module, name, other in places if hasattr(module, name)]
    try:
        for module, name, original, other in own:
            setattr(module, name, _for_fakes(original, other))
        yield
    finally:
        for module, name, original, _ in own:
            setattr(module, name, original)


def _for_fakes(original: Callable, other: Callable) -> Callable:
    def function(first, *args, **kwargs):
        return (original if first is None or has_values(first) else other)(first, *args, **kwargs)

    return function


def _without_padding(original: Callable, mask: torch.Tensor, *args, **kwargs) -> bool:
    """Whether a mask that hides nothing can be left out: what is asked where there is none."""
    return original(None, *args, **kwargs)


def attention(
    kernels: str, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> torch.Tensor:
    """`F.scaled_dot_product_attention` by the kernel that torch would choose on a CPU or on a CUDA device.

    On a CPU that is the flash kernel; on CUDA the flash kernel, and with a mask, two widths or in float32 the memory-efficient
    one. Where a CPU's kernel does not apply, the products are plain.
    """
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    trained_mask = attn_mask is not None and attn_mask.requires_grad
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, 0.0, -torch.inf)
        attn_mask = attn_mask.to(query.dtype)
    one_width = query.shape[-1] == value.shape[-1]
    if kernels == "cpu":
        options = {"attn_mask": attn_mask, "scale": scale}
        broadcast = query.shape[1] != key.shape[1] and not enable_gqa
        if one_width and not broadcast and not trained_mask:
            flash = _aten._scaled_dot_product_flash_attention_for_cpu
            return flash(query, key, value, dropout_p, is_causal, **options)[0]
        plain = _aten._scaled_dot_product_attention_math
        return plain(query, key, value, dropout_p=dropout_p, is_causal=is_causal, enable_gqa=enable_gqa, **options)[0]
    if attn_mask is None and one_width and query.dtype != torch.float32:
        return _aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    return _aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]


class _GroupedProduct(torch.autograd.Function):
    """Keeps what torch's kernel keeps: the rows for a gradient of the weights, and the other way round."""

    @staticmethod
    def forward(ctx, rows, weights, offsets):
        of_rows, of_weights, _ = ctx.needs_input_grad
        ctx.save_for_backward(rows if of_weights else None, weights if of_rows else None, offsets)
        ctx.shape = weights.shape
        return torch.ops.transformers.grouped_mm_fallback(rows, weights, offsets)

    @staticmethod
    def backward(ctx, gradient):
        rows, weights, offsets = ctx.saved_tensors
        of_rows = of_weights = None
        if weights is not None:
            of_rows = torch.ops.transformers.grouped_mm_fallback(gradient, weights.transpose(-2, -1), offsets)
        if rows is not None:
            of_weights = gradient.new_empty(ctx.shape)
        return of_rows, of_weights, None


def grouped_product(rows, weights, offs=None, bias=None, out_dtype=None) -> torch.Tensor:
    """`F.grouped_mm` in any dtype."""
    return _GroupedProduct.apply(rows, weights, offs)
