"""Runs the Triton kernels on the CPU and prints how far they are from their torch twins; a test starts it.

A process of its own, because `TRITON_INTERPRET` is read when Triton is imported and changes every kernel defined after.
bfloat16 appears in loads and stores only: the interpreter's arithmetic in it is wrong, and its stores are rounded otherwise
than torch's, by up to one step.
"""

import itertools
import json

import torch

from hf_qst_kernels import (
    dequantize_taps,
    linear_cross_entropy,
    quantize_taps,
    tap_linear,
    use_backend,
)
from hf_qst_kernels.ops import linear_cross_entropy_triton as cross_entropy_triton

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def both(call):
    results = []
    for backend in ("torch", "triton"):
        with use_backend(backend):
            results.append(call())
    return results


def distance(ours, twin):
    """Largest difference over the twin's largest entry (at least 0.1); infinite where one of them is NaN."""
    difference = (ours.double() - twin.double()).abs()
    if not bool(difference.isfinite().all()):
        return float("inf")
    return (difference.max() / twin.double().abs().max().clamp(min=0.1)).item()


def cross_entropy():
    options = {
        "plain": {},
        "smoothing": {"label_smoothing": 0.1},
        "softcap": {"logit_softcap": 2.0},
        "both": {"label_smoothing": 0.3, "logit_softcap": 2.0, "logit_scale": 1.7, "reduction": "sum"},
    }
    shapes = [(1, 1), (7, 3), (5, 1000), (3, 4097), (2, 9000)]
    cross_entropy_triton.MAX_BLOCK = 1024  # several blocks a row at sizes the interpreter is not slow at
    for (tokens, vocab), name, dtype in itertools.product(shapes, options, DTYPES):
        hidden = torch.randn(tokens, 16, requires_grad=True)
        weight = torch.randn(vocab, 16).to(DTYPES[dtype])
        labels = torch.randint(vocab, (tokens,))
        labels[1:2] = -100

        def step(hidden=hidden, weight=weight, labels=labels, name=name):
            loss = linear_cross_entropy(hidden, weight, labels, chunk_size=4, **options[name])
            return loss.detach(), *torch.autograd.grad(loss, hidden)

        (twin_loss, twin_grad), (loss, grad) = both(step)
        error = max(distance(loss, twin_loss), distance(grad, twin_grad))
        yield f"cross_entropy {name} {tokens}x{vocab} {dtype}", error


def cross_entropy_rows_kept():
    """Under CUDA graph capture no row is dropped: the kernel sees ignored labels and wrong ones."""
    logits = torch.randn(4, 1000)
    expected = torch.softmax(logits, 1)
    labels = torch.tensor([3, -100, 1000, 999], dtype=torch.int32)
    losses = torch.full((4,), float("nan"))
    log_p = torch.log_softmax(logits, 1)
    cross_entropy_triton.cross_entropy_chunk(logits, labels, losses, -100, 0.0, None, True)
    expected[0, 3] -= 1
    expected[3, 999] -= 1
    yield "ignored row", float(losses[1].abs() + logits[1].abs().max())
    yield "label out of range", 0.0 if losses[2].isnan() else float("inf")
    yield "rows beside them", distance(torch.stack([losses[0], losses[3]]), -log_p[[0, 3], [3, 999]])
    yield "gradients beside them", distance(logits[[0, 3]], expected[[0, 3]])
    masked = torch.randn(1, 3000)
    masked[:, :1500] = -float("inf")
    expected = torch.softmax(masked, 1)
    expected[0, 2000] -= 1
    log_p = torch.log_softmax(masked, 1)
    cross_entropy_triton.cross_entropy_chunk(masked, torch.tensor([2000]), losses[:1], -100, 0.0, None, True)
    yield "masked words", max(distance(losses[:1], -log_p[:, 2000]), distance(masked, expected))
    before = torch.randn(2, 50)
    after = before.clone()
    cross_entropy_triton.cross_entropy_chunk(after, torch.tensor([0, 1]), losses[:2], -100, 0.0, None, False)
    yield "logits untouched without a gradient", 0.0 if torch.equal(before, after) else float("inf")


def taps():
    shapes = [(1, 1), (7, 64), (3, 65), (5, 130), (2, 3, 1023), (40, 70)]
    for shape, dtype, block in itertools.product(shapes, DTYPES, (64, 24)):
        x = (torch.randn(shape) * 5).to(DTYPES[dtype])
        x[..., :3] = 0
        x.view(-1)[-1] = 1e4

        def quantise(x=x, block=block):
            return quantize_taps(x, block)

        (twin_q, twin_scales), (q, scales) = both(quantise)
        same = torch.equal(q, twin_q) and torch.equal(scales, twin_scales)
        yield f"quantize {shape} {dtype} block {block}", 0.0 if same else float("inf")
        for out in DTYPES:
            twin, ours = both(lambda q=q, s=scales, out=out, block=block: dequantize_taps(q, s, DTYPES[out], block))
            yield f"dequantize {shape} {dtype} block {block} to {out}", distance(ours, twin)
        weight = torch.randn(4, shape[-1], requires_grad=True)
        twin, ours = both(lambda x=x, w=weight: torch.autograd.grad(tap_linear(x, w).sum(), w)[0])
        yield f"tap_linear {shape} {dtype} block {block}", distance(ours, twin)


def taps_special_values():
    x = torch.randn(3, 192)
    x[0, :64] = 0
    x[0, 64:128] = 1e-36
    x[1, 70], x[2, 5], x[2, 130] = float("nan"), float("inf"), 3e38
    (twin_q, _), (q, scales) = both(lambda: quantize_taps(x))
    restored = dequantize_taps(q, scales)
    broken = [restored[1, 64:128], restored[2, :64]]
    fine = [restored[0], restored[1, :64], restored[1, 128:], restored[2, 64:]]
    yield "zeros and tiny blocks", restored[0, :128].abs().max().item()
    yield "not finite stays so", 0.0 if not any(part.isfinite().any() for part in broken) else float("inf")
    yield "others stay finite", 0.0 if all(part.isfinite().all() for part in fine) else float("inf")
    yield "huge", abs(restored[2, 130].item() / 3e38 - 1)
    yield "finite blocks as torch", 0.0 if torch.equal(q[0], twin_q[0]) else float("inf")
    ties = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5]])
    twin, ours = both(lambda: quantize_taps(ties)[0])
    yield "ties to even", 0.0 if torch.equal(ours, twin) else float("inf")


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    cases = (cross_entropy, cross_entropy_rows_kept, taps, taps_special_values)
    print(json.dumps({name: error for case in cases for name, error in case()}))
