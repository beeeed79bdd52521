"""Triton path of `linear_cross_entropy`: all that lies between its two GEMMs, one program a row."""

import torch
import triton
import triton.language as tl

MAX_BLOCK = 8192


@triton.jit
def _tanh(x):
    # libdevice's tanh is absent from the interpreter; this form has the right limits at both ends
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def cross_entropy_rows(
    logits, row_stride, labels, losses, vocab, ignore_index, smoothing, softcap,
    SOFTCAP: tl.constexpr, SMOOTH: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`losses[row]`, and with `GRAD` the gradient in `logits[row]`'s place, all arithmetic in float32."""
    row = tl.program_id(0).to(tl.int64)  # row * row_stride passes 2^31 at 16k rows of a 131k vocabulary
    logits += row * row_stride
    label = tl.load(labels + row).to(tl.int64)
    columns = tl.arange(0, BLOCK)

    if label == ignore_index:
        tl.store(losses + row, 0.0)
        if GRAD:
            for start in range(0, vocab, BLOCK):
                tl.store(logits + start + columns, 0.0, mask=start + columns < vocab)
        return

    in_range = (label >= 0) & (label < vocab)
    label_logit = tl.load(logits + label, mask=in_range, other=float("nan")).to(tl.float32)
    if SOFTCAP:
        label_logit = softcap * _tanh(label_logit / softcap)

    row_max = -3.0e38  # finite: a first block of -inf (words masked out by the bias) must not give inf - inf
    normalizer = 0.0
    total = 0.0
    for start in range(0, vocab, BLOCK):
        mask = start + columns < vocab
        x = tl.load(logits + start + columns, mask=mask, other=0.0).to(tl.float32)
        if SOFTCAP:
            x = softcap * _tanh(x / softcap)
        if SMOOTH:
            total += tl.sum(tl.where(mask, x, 0.0), 0)
        x = tl.where(mask, x, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(x, 0))
        normalizer = normalizer * tl.exp(row_max - new_max) + tl.sum(tl.exp(x - new_max), 0)
        row_max = new_max
    logsumexp = row_max + tl.log(normalizer)

    loss = logsumexp - (1.0 - smoothing) * label_logit
    if SMOOTH:
        loss -= smoothing * (total / vocab)
    tl.store(losses + row, loss)

    if GRAD:
        tl.debug_barrier()  # every warp has read the label's logit before one overwrites it
        for start in range(0, vocab, BLOCK):
            mask = start + columns < vocab
            x = tl.load(logits + start + columns, mask=mask, other=0.0).to(tl.float32)
            slope = 1.0
            if SOFTCAP:
                tanh = _tanh(x / softcap)
                slope = 1.0 - tanh * tanh
                x = softcap * tanh
            grad = tl.exp(x - logsumexp)
            if SMOOTH:
                grad -= smoothing / vocab
            grad = tl.where(start + columns == label, grad - (1.0 - smoothing), grad)
            tl.store(logits + start + columns, (grad * slope).to(logits.dtype.element_ty), mask=mask)


def launch_options(vocab: int) -> dict:
    """Block size and warps for a vocabulary: 16 columns a thread, one block for what fits into one."""
    block = min(MAX_BLOCK, triton.next_power_of_2(vocab))
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 512)), "enable_fp_fusion": True}


def cross_entropy_chunk(logits, labels, losses, ignore_index, label_smoothing, softcap, compute_grad) -> None:
    """Fill `losses [rows]`, float32, and with `compute_grad` turn `logits [rows, vocab]` into their gradient in place.

    An ignored row gets loss and gradient 0, a label out of range NaN.
    """
    rows, vocab = logits.shape
    if rows == 0:
        return
    with torch.cuda.device_of(logits):
        numbers = vocab, ignore_index, label_smoothing, 1.0 if softcap is None else softcap
        flags = {"SOFTCAP": softcap is not None, "SMOOTH": label_smoothing > 0, "GRAD": compute_grad}
        operands = logits, logits.stride(0), labels.contiguous(), losses, *numbers
        cross_entropy_rows[(rows,)](*operands, **flags, **launch_options(vocab))
