"""What one operation of a run takes: products, bytes read and written, and memory that is gone when it returns.

torch's own counter of products knows its operators. Those here are of packages: their shape functions do not show what
they allocate and multiply inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import flop_registry

from hf_qst_kernels.ops.linear_cross_entropy import default_chunk_rows

_FLOAT32 = 4


@dataclass(frozen=True)
class Work:
    """Of one operation.

    Attributes:
        products (`int`): floating-point operations of matrix products, two for each multiplication and addition.
        moved (`int`): bytes read and written.
        workspace (`int`): bytes allocated and freed inside.
        wide (`bool`): whether nothing that is multiplied is in 16 bits.
    """

    products: int
    moved: int
    workspace: int
    wide: bool


def work_of(function, args: Sequence, kwargs: dict, out, kernels: str) -> Work:
    """What a call of an operator takes.

    Args:
        function (`torch._ops.OpOverload`)
        out: its result.
        kernels (`str`): `"cpu"` or `"cuda"`, for operators that choose sizes of chunks by it.
    """
    given, made = tensors(args, kwargs), tensors([out], {})
    moved = sum(t.numel() * t.element_size() for t in (*given, *made))
    products, more, workspace = 0, 0, 0
    if (count := _COUNTED.get(function._schema.name)) is not None:
        products, more, workspace = count(args, kwargs, out, kernels)
    elif (formula := flop_registry.get(function._overloadpacket)) is not None:
        products = formula(*args, **kwargs, out_val=out)
        if _is_causal(function, args, kwargs):
            products //= 2
    narrow = any(t.dtype in (torch.bfloat16, torch.float16) for t in given)
    return Work(products, moved + more, workspace, not narrow)


def tensors(args: Sequence, kwargs: dict) -> list[torch.Tensor]:
    """The tensors among the arguments of an operator, in lists too."""
    found = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [one for one in value if isinstance(one, torch.Tensor)]
    return found


def _is_causal(function, args: Sequence, kwargs: dict) -> bool:
    if "attention" not in function._schema.name:
        return False
    names = [argument.name for argument in function._schema.arguments]
    return bool({**dict(zip(names, args, strict=False)), **kwargs}.get("is_causal", False))


def _numel(*sizes: int) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def _attention(args, kwargs, out, kernels) -> tuple[int, int, int]:
    query, key = args[0], args[1]
    causal = 2 if len(args) > 4 and args[4] else 1
    return 4 * query.numel() * key.shape[-2] // causal, 0, 0


def _attention_backward(args, kwargs, out, kernels) -> tuple[int, int, int]:
    query, key = args[1], args[2]
    causal = 2 if len(args) > 7 and args[7] else 1
    return 10 * query.numel() * key.shape[-2] // causal, 0, 0


def _grouped(args, kwargs, out, kernels) -> tuple[int, int, int]:
    rows, weights = args[0], args[1]
    return 2 * rows.shape[0] * _numel(*weights.shape[-2:]), 0, 0


def _grouped_backward(args, kwargs, out, kernels) -> tuple[int, int, int]:
    rows, weights = args[0], args[1]
    return 4 * rows.shape[0] * _numel(*weights.shape[-2:]), 0, 0


def _four_bit_product(args, kwargs, out, kernels) -> tuple[int, int, int]:
    """bitsandbytes writes the weight in the inputs' dtype and multiplies by it."""
    x, _, shape = args[:3]
    dense = _numel(*shape) * x.element_size()
    return 2 * x.numel() * shape[0], 2 * dense, dense


def _loss(args, kwargs, out, kernels) -> tuple[int, int, int]:
    """Two products with the head, and passes over the logits of a chunk of tokens."""
    hidden, weight, gradient = args[0], args[1], args[10]
    four_bit = len(args) > 11 and args[11] is not None
    vocab = 2 * weight.numel() // hidden.shape[-1] if four_bit else weight.shape[0]
    rows = min(default_chunk_rows(vocab, kernels, four_bit), hidden.shape[0])
    width = hidden.element_size()
    logits = hidden.shape[0] * vocab * width
    products = 2 * hidden.shape[0] * hidden.shape[1] * vocab * (2 if gradient else 1)
    return products, 6 * logits, rows * vocab * (width if width == _FLOAT32 else width + _FLOAT32)


def _tap(args, kwargs, out, kernels) -> tuple[int, int, int]:
    x, weight = args[:2]
    return 2 * x.numel() * weight.shape[0], 0, 0


def _tap_gradient(args, kwargs, out, kernels) -> tuple[int, int, int]:
    gradient, kept = args[:2]
    return 2 * kept.numel() * gradient.shape[-1], 2 * kept.numel(), 0


_COUNTED: dict[str, Callable] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "transformers::grouped_mm_fallback": _grouped,
    "transformers::grouped_mm_fallback_backward": _grouped_backward,
    "bitsandbytes::gemm_4bit": _four_bit_product,
    "hf_qst::linear_cross_entropy": _loss,
    "hf_qst::tap_linear": _tap,
    "hf_qst::tap_linear_grad_weight": _tap_gradient,
}
