"""Cross entropy of a frozen linear head without its `[tokens, vocab]` logits.

For `z = logit_scale * (h W^T + b)`, `l = cap * tanh(z / cap)` and `p = softmax(l)`, a row with label `y` has

    loss = logsumexp(l) - (1 - eps) * l_y - eps * mean(l)
    d loss / d l = p - (1 - eps) * onehot(y) - eps / vocab
    d l / d z = 1 - tanh(z / cap)^2
    d loss / d h = logit_scale * (d loss / d z) W

The head is frozen, so `d loss / d h` is all that backward can be asked for: it is computed in forward, a chunk of rows
at a time, and only multiplied by the incoming gradient in backward (the idea of Liger-Kernel's fused linear cross
entropy, https://arxiv.org/abs/2410.10989, section 3.2, less its weight gradient).

`W` may be in 4 bits. It is then dequantised some words at a time, for the logits of these words and again for their
share of `(d loss / d z) W`, so that neither all logits nor all of `W` exists at once.
"""

import math
from collections.abc import Callable

import torch

from hf_qst_kernels.arguments import check_floats, check_shape
from hf_qst_kernels.dispatch import autocast_dtype, runs_naive, runs_triton
from hf_qst_kernels.nf4_weight import (
    BLOCK,
    NF4Weight,
    check_blocks,
    check_weight,
    library_weight,
    naive_weight,
    some_rows,
    with_plain_scales,
)
from hf_qst_kernels.operators import operator

# float32 bytes of one chunk's logits. Larger chunks make better GEMMs, smaller ones take less memory.
CHUNK_BYTES = {"cpu": 16 * 2**20, "cuda": 64 * 2**20}
# Each GEMM of a chunk reads the whole weight, so one of few rows is bound by that and not by arithmetic: below 206 rows
# in bfloat16 on an H200 (989 TFLOP/s, 4.8 TB/s).
MIN_CHUNK_ROWS = {"cpu": 128, "cuda": 256}
# A 4-bit weight is dequantised twice a chunk, some 5 bytes moved a weight each time: at 4.8 TB/s and 700 TFLOP/s that is
# 365 / rows of the GEMMs' time.
MIN_CHUNK_ROWS_NF4 = {"cpu": 256, "cuda": 1024}
# Bytes of a 4-bit head's weight that are dequantised at once.
SLICE_BYTES = {"cpu": 16 * 2**20, "cuda": 64 * 2**20}
# The torch path's elementwise passes go over this much of a chunk at a time: on CPU it stays in the cache from pass to
# pass, and everywhere it bounds the float32 copy of half precision logits.
BLOCK_BYTES = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor | NF4Weight,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: str = "mean",
    chunk_size: int | None = None,
) -> torch.Tensor:
    """
    Cross entropy of `softcap(logit_scale * (hidden @ weight.T + bias))` against `labels`, for a frozen head.

    Equals `torch.nn.functional.cross_entropy` of these logits (label smoothing included) and its gradient in `hidden`,
    while the logits and their gradient exist for one chunk of rows at a time. Kept for backward: one tensor of
    `hidden`'s shape and dtype, and one number; nothing if `hidden` needs no gradient. Rows labelled `ignore_index` are
    left out of the head's GEMM. The GEMMs run in `weight`'s dtype, with a 4-bit weight in `hidden`'s (autocast's, where
    that is on), and what lies between them in float32. The gradient cannot be differentiated again.

    A 4-bit weight is dequantised a slice of the vocabulary at a time, at most 16 MiB on CPU and 64 MiB on CUDA, twice
    for each chunk of rows. What the slices add to the gradient is rounded to the GEMM's dtype once for each, and summed
    in float32.

    Args:
        hidden (`torch.Tensor`): `[..., dim]`, the head's input; may require a gradient.
        weight (`torch.Tensor` or [`NF4Weight`]): `[vocab, dim]`, frozen.
        labels (`torch.Tensor`): `[...]`, integers in `[0, vocab)` or `ignore_index`; not shifted here.
        bias (`torch.Tensor`, *optional*): `[vocab]`, frozen.
        ignore_index (`int`): label of the rows that count neither in the loss nor in the mean.
        label_smoothing (`float`): share `eps` in [0, 1] of the target spread evenly over the vocabulary.
        logit_softcap (`float`, *optional*): `cap` of `cap * tanh(logits / cap)`, as in Gemma 2; `None` for none.
        logit_scale (`float`): factor on the logits before the cap.
        reduction (`str`): `"mean"` over the rows not ignored, or `"sum"`.
        chunk_size (`int`, *optional*): rows whose logits exist at once; `None` chooses by vocabulary and device.

    Returns:
        `torch.Tensor`: scalar, float32 (float64 for float64 inputs). Without a counted row: 0 for `"sum"`, NaN for
        `"mean"`, with a zero gradient, as torch has it.

    Raises:
        TypeError: `hidden`, `weight` or `bias` not floating point, `labels` not integer, or a dtype other than those of
            [`NF4Weight`].
        ValueError: shapes that do not fit, a head that requires a gradient, a label out of range, or another argument
            out of its range. On CUDA the labels' check comes with the number of rows to keep, in the op's one host
            synchronisation. While a CUDA graph is captured there is none: then no row is dropped, and a label out of
            range gives a NaN loss.
    """
    _check(hidden, weight, labels, bias, label_smoothing, logit_softcap, logit_scale, reduction, chunk_size)
    if runs_naive():
        return naive_linear_cross_entropy(
            hidden,
            weight,
            labels,
            bias,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            logit_softcap=logit_softcap,
            logit_scale=logit_scale,
            reduction=reduction,
        )
    compute_grad = torch.is_grad_enabled() and hidden.requires_grad
    dtype, packed = autocast_dtype(hidden.device.type), ()
    if isinstance(weight, NF4Weight):
        weight, absmax, _, *nested = weight
        packed = (absmax, *nested, dtype or hidden.dtype)
    else:
        weight = weight.to(dtype or weight.dtype)
    loss, _, _ = _linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1),
        bias,
        ignore_index,
        float(label_smoothing),
        None if logit_softcap is None else float(logit_softcap),
        float(logit_scale),
        reduction,
        chunk_size,
        compute_grad,
        *packed,
    )
    return loss


def naive_linear_cross_entropy(
    hidden, weight, labels, bias=None, *,
    ignore_index=-100, label_smoothing=0.0, logit_softcap=None, logit_scale=1.0, reduction="mean", chunk_size=None,
):  # fmt: skip
    """The equation at the top of this file, in float32 at least, with all logits at once."""
    compute = torch.promote_types(hidden.dtype, torch.float32)
    weight = naive_weight(weight, compute) if isinstance(weight, NF4Weight) else weight.to(compute)
    z = (hidden.reshape(-1, hidden.shape[-1]).to(compute) @ weight.T).to(compute)  # autocast rounds products
    logits = logit_scale * (z if bias is None else z + bias)
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    labels = labels.reshape(-1).to(torch.int64)
    counted = labels != ignore_index
    label_logit = logits.gather(1, labels.where(counted, 0)[:, None]).squeeze(1)
    loss = logits.logsumexp(1) - (1 - label_smoothing) * label_logit - label_smoothing * logits.mean(1)
    total = loss.where(counted, 0.0).sum()
    return total / counted.sum() if reduction == "mean" else total


def default_chunk_rows(vocab: int, device_type: str, nf4: bool = False) -> int:
    """
    Rows whose float32 logits fill `CHUNK_BYTES`, but at least `MIN_CHUNK_ROWS`, or those of a 4-bit head.

    Whole tiles of the GEMMs, 128 rows, where there are that many.
    """
    least = _on(device_type, MIN_CHUNK_ROWS_NF4 if nf4 else MIN_CHUNK_ROWS)
    return max(least, _on(device_type, CHUNK_BYTES) // (4 * vocab) // 128 * 128)


def _on(device_type: str, limits: dict[str, int]) -> int:
    return limits.get(device_type, limits["cuda"])


def _check(hidden, weight, labels, bias, label_smoothing, logit_softcap, logit_scale, reduction, chunk_size) -> None:
    if isinstance(weight, NF4Weight):
        check_floats(hidden=hidden, bias=bias)
        check_blocks("hidden", hidden)
        check_weight(weight, hidden.shape[-1])
        vocab, trainable = weight.out_features, {"bias": bias}
    else:
        if not isinstance(weight, torch.Tensor):
            raise TypeError(f"weight must be a tensor or an NF4Weight, got {type(weight).__name__}")
        check_floats(hidden=hidden, weight=weight, bias=bias)
        if hidden.dim() < 1 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
            raise ValueError(
                f"weight must be [vocab, dim] for hidden [..., dim], got {list(weight.shape)} and {list(hidden.shape)}"
            )
        if weight.shape[0] < 1:
            raise ValueError(f"weight must have at least one row, got {list(weight.shape)}")
        vocab, trainable = weight.shape[0], {"weight": weight, "bias": bias}
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels must have hidden's shape less its last axis, {list(hidden.shape[:-1])}, got {list(labels.shape)}"
        )
    check_shape("bias", bias, (vocab,), "[vocab]")
    if torch.is_grad_enabled():
        for name, tensor in trainable.items():
            if tensor is not None and tensor.requires_grad:
                raise ValueError(
                    f"{name} requires a gradient, which linear_cross_entropy does not compute: freeze the head "
                    f"({name}.requires_grad_(False)) or use torch.nn.functional.cross_entropy"
                )
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if logit_softcap is not None and not (0.0 < logit_softcap < math.inf):
        raise ValueError(f"logit_softcap must be None or a finite number > 0, got {logit_softcap}")
    if not -math.inf < logit_scale < math.inf:
        raise ValueError(f"logit_scale must be finite, got {logit_scale}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be None or an integer >= 1, got {chunk_size}")


@operator("linear_cross_entropy")
def _linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    logit_softcap: float | None,
    logit_scale: float,
    reduction: str,
    chunk_size: int | None,
    compute_grad: bool,
    absmax: torch.Tensor | None = None,
    nested_absmax: torch.Tensor | None = None,
    nested_code: torch.Tensor | None = None,
    nested_offset: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, the gradient in `hidden` of the unscaled sum of losses, and the factor that it still lacks.

    With `absmax`, `weight` is the packed one of an `NF4Weight`, and `dtype` that of the GEMMs.

    The factor (`logit_scale` / number of rows) waits for backward, where it meets the incoming gradient in float32: in
    float16 a gradient of a mean over many rows underflows before a loss scaler can lift it.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        tokens, dim = hidden.shape
        if absmax is None:
            vocab, dtype = weight.shape[0], weight.dtype
            slices, words = [slice(0, vocab)], weight.__getitem__
        else:
            vocab = 2 * weight.numel() // dim
            packed = NF4Weight(weight, absmax, vocab, nested_absmax, nested_code, nested_offset)
            slices, words = _slices(packed, dtype)
        kept, count = _rows_to_keep(labels, ignore_index, vocab)
        rows = tokens if kept is None else kept.shape[0]
        chunk = min(chunk_size or default_chunk_rows(vocab, hidden.device.type, absmax is not None), max(rows, 1))
        stats_dtype = torch.promote_types(dtype, torch.float32)

        losses = torch.empty(rows, dtype=stats_dtype, device=hidden.device)
        logits = torch.empty(chunk, vocab, dtype=dtype, device=hidden.device)
        grad = hidden.new_empty(0)
        if compute_grad:
            grad = hidden.new_empty(hidden.shape) if kept is None else hidden.new_zeros(hidden.shape)
        softmax_chunk = _triton_chunk if runs_triton("linear_cross_entropy", logits) else _torch_chunk
        bias = None if bias is None else bias.to(dtype)

        for start in range(0, rows, chunk):
            stop = min(start + chunk, rows)
            index = slice(start, stop) if kept is None else kept[start:stop]
            chunk_logits = logits[: stop - start]
            chunk_hidden = hidden[index].to(dtype)
            for part in slices:
                out = chunk_logits[:, part]
                # beta=0 ignores what the buffer holds, so the factor on the logits costs no pass of its own
                addend, beta = (out, 0.0) if bias is None else (bias[part], logit_scale)
                torch.addmm(addend, chunk_hidden, words(part).t(), beta=beta, alpha=logit_scale, out=out)
            options = ignore_index, label_smoothing, logit_softcap, compute_grad
            softmax_chunk(chunk_logits, labels[index], losses[start:stop], *options)
            if not compute_grad:
                continue
            if len(slices) > 1:
                total = torch.zeros(stop - start, dim, dtype=stats_dtype, device=hidden.device)
                for part in slices:
                    total += torch.mm(chunk_logits[:, part], words(part))
                grad[index] = total.to(grad.dtype)
            elif kept is None and hidden.dtype == dtype:
                torch.mm(chunk_logits, words(slices[0]), out=grad[index])
            else:
                grad[index] = torch.mm(chunk_logits, words(slices[0])).to(grad.dtype)

        loss = losses.sum()
        if reduction == "sum":
            return loss, grad, torch.full_like(loss, logit_scale)
        return loss / count, grad, torch.full_like(loss, logit_scale) / count.clamp(min=1)


@_linear_cross_entropy.register_fake
def _(
    hidden, weight, labels, bias, ignore_index, label_smoothing, logit_softcap, logit_scale, reduction, chunk_size,
    compute_grad, absmax=None, nested_absmax=None, nested_code=None, nested_offset=None, dtype=None,
):  # fmt: skip
    stats_dtype = torch.promote_types(dtype or weight.dtype, torch.float32)
    return (
        hidden.new_empty((), dtype=stats_dtype),
        hidden.new_empty(hidden.shape if compute_grad else 0),
        hidden.new_empty((), dtype=stats_dtype),
    )


def _setup_context(ctx, inputs, output) -> None:
    _, grad, factor = output
    ctx.mark_non_differentiable(grad, factor)
    ctx.set_materialize_grads(False)  # else zeros of grad's size in backward
    ctx.save_for_backward(grad, factor)


def _backward(ctx, grad_loss, _grad_of_grad, _grad_of_factor):
    if grad_loss is None:
        return (None,) * 16
    grad, factor = ctx.saved_tensors
    return (_scale_gradient(grad, grad_loss * factor), *(None,) * 15)


_linear_cross_entropy.register_autograd(_backward, setup_context=_setup_context)


# An op of its own without an autograd formula: differentiating the gradient again then fails with torch's message for
# that, where a plain multiplication would silently treat d loss / d hidden as a constant.
@operator("scale_gradient")
def _scale_gradient(grad: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(grad)
    # a factor of shape [1] takes part in type promotion, one of shape [] would be rounded to half precision first
    return torch.mul(grad, factor.reshape(1), out=out)


@_scale_gradient.register_fake
def _(grad, factor):
    return torch.empty_like(grad)


def _slices(weight: NF4Weight, dtype: torch.dtype) -> tuple[list[slice], Callable[[slice], torch.Tensor]]:
    """Slices of the vocabulary, and the function that dequantises one of them to `[words, dim]`."""
    vocab, dim = weight.out_features, weight.in_features
    # whole tiles of the GEMMs, whose columns then start at boundaries that wide loads need
    size = _on(weight.packed.device.type, SLICE_BYTES) // (dim * dtype.itemsize)
    size = max(BLOCK, size // BLOCK * BLOCK)
    weight = with_plain_scales(weight, torch.promote_types(dtype, torch.float32))
    slices = [slice(start, min(start + size, vocab)) for start in range(0, vocab, size)]
    return slices, lambda part: library_weight(some_rows(weight, part), dtype)


def _rows_to_keep(labels, ignore_index, vocab) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Indices of the rows that count (`None`: take all rows as they are) and their number as a 0-dim tensor."""
    valid = labels != ignore_index
    count = valid.sum()
    if labels.is_cuda and torch.cuda.is_current_stream_capturing():
        return None, count
    out_of_range = (valid & ((labels < 0) | (labels >= vocab))).sum()
    rows, wrong = torch.stack([count, out_of_range]).tolist()
    if wrong:
        first = labels[valid & ((labels < 0) | (labels >= vocab))][0].item()
        raise ValueError(
            f"labels must be in [0, {vocab}) or ignore_index ({ignore_index}), got {wrong} others, the first {first}"
        )
    if rows == labels.shape[0]:
        return None, count
    # not nonzero(), whose output size would be a second synchronisation
    return torch.argsort(valid.to(torch.uint8), descending=True, stable=True)[:rows], count


def _torch_chunk(logits, labels, losses, ignore_index, label_smoothing, softcap, compute_grad) -> None:
    """Fill `losses` [rows] and, if asked for, turn `logits` [rows, vocab] into d loss / d z in place."""
    rows, vocab = logits.shape
    device_bytes = BLOCK_BYTES.get(logits.device.type, BLOCK_BYTES["cuda"])
    block = max(1, device_bytes // (losses.element_size() * vocab))
    for start in range(0, rows, block):
        part = slice(start, start + block)
        _torch_block(logits[part], labels[part], losses[part], ignore_index, label_smoothing, softcap, compute_grad)


def _torch_block(logits, labels, losses, ignore_index, label_smoothing, softcap, compute_grad) -> None:
    vocab = logits.shape[1]
    valid = (labels != ignore_index).unsqueeze(1)
    # rows to ignore and labels out of range get here only under CUDA graph capture; the clamp keeps gathers in bounds
    target = labels.to(torch.int64).unsqueeze(1)
    outside = valid & ((target < 0) | (target >= vocab))
    target = target.clamp(0, vocab - 1)

    probs = logits.to(losses.dtype)  # the same tensor for float32, a block-sized copy for half precision
    tanh = None
    if softcap is not None:
        tanh = (probs / softcap).tanh_()
        torch.mul(tanh, softcap, out=probs)
    label_logit = probs.gather(1, target)
    smooth_logit = probs.mean(1, keepdim=True) if label_smoothing > 0 else 0.0
    # softmax keeps its normalizer to itself, but the largest probability, never below 1 / vocab, is
    # exp(max - logsumexp)
    logsumexp = probs.amax(1, keepdim=True)
    torch.softmax(probs, 1, out=probs)
    logsumexp = logsumexp - probs.amax(1, keepdim=True).log_()
    loss = logsumexp - (1 - label_smoothing) * label_logit - label_smoothing * smooth_logit
    losses.copy_(torch.where(valid, loss, 0.0).masked_fill_(outside, float("nan")).squeeze(1))
    if not compute_grad:
        return
    probs.scatter_add_(1, target, torch.full_like(label_logit, label_smoothing - 1))
    if label_smoothing > 0:
        probs.sub_(label_smoothing / vocab)
    if tanh is not None:
        probs.mul_(tanh.square_().neg_().add_(1))
    if probs.data_ptr() != logits.data_ptr():
        logits.copy_(probs)
    if logits.is_cuda:
        logits.masked_fill_(~valid, 0)


def _triton_chunk(logits, labels, losses, ignore_index, label_smoothing, softcap, compute_grad) -> None:
    from hf_qst_kernels.ops import linear_cross_entropy_triton

    linear_cross_entropy_triton.cross_entropy_chunk(
        logits, labels, losses, ignore_index, label_smoothing, softcap, compute_grad
    )
