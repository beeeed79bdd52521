"""Runs 4-bit layers on our kernels, on the CPU, beside bitsandbytes' own forward and prints what came of it; a test starts it.

A process of its own, because `TRITON_INTERPRET` is read when Triton is imported and changes every kernel defined after.
"""

import contextlib
import copy
import json
import sys
from pathlib import Path

import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model

from hf_qst import use_nf4_kernels
from hf_qst.packed_weights import forbid_packing
from hf_qst_kernels import nf4_triton, use_backend
from tests.architectures import in_nf4, token_batch


class Calls:
    """Counts the launches of the two kernels."""

    def __init__(self):
        self.count = 0
        for name in ("multiply", "multiply_transposed"):
            setattr(nf4_triton, name, self._counting(getattr(nf4_triton, name)))

    def _counting(self, kernel):
        def call(*args):
            self.count += 1
            kernel(*args)

        return call

    def during(self, call):
        before = self.count
        result = call()
        return result, self.count - before


CALLS = Calls()


def product(layer, x, upstream):
    x = x.clone().requires_grad_()
    y = layer(x)
    return y.detach(), *torch.autograd.grad(y, x, upstream)


def layers():
    """Distance of outputs and input gradients from bitsandbytes', and the kernels launched, for each kind of call."""
    for double in (False, True):
        for bias in (False, True):
            for shape in ((1, 128), (2, 3, 128), (64, 128), (65, 128), (2, 0, 128)):
                theirs = Linear4bit(128, 97, bias, torch.float32, double, "nf4").to("cpu")
                theirs.compute_type_is_set = True
                ours = copy.deepcopy(theirs)
                use_nf4_kernels(ours)
                x, upstream = torch.randn(shape), torch.randn(*shape[:-1], 97)
                results, launches = CALLS.during(lambda o=ours, x=x, u=upstream: product(o, x, u))
                pairs = list(zip(results, product(theirs, x, upstream), strict=True))
                distances = [(a - b).abs().max().item() for a, b in pairs if a.numel()]
                same = all(a.dtype == b.dtype and a.shape == b.shape for a, b in pairs)
                yield (
                    f"{'double' if double else 'single'} {bias} {list(shape)}",
                    [max(distances, default=0.0), same, launches],
                )


def types():
    """bfloat16 inputs of a layer that computes in float32, and a layer whose first forward settles its type."""
    layer = Linear4bit(64, 32, True, torch.float32, True, "nf4").to("cpu").train()
    forbid_packing(layer)
    x = torch.randn(3, 64).bfloat16()
    expected = layer(x)
    use_nf4_kernels(layer)
    y, launches = CALLS.during(lambda: layer(x))
    yield "half precision input", [(y.float() - expected.float()).abs().max().item(), y.dtype == x.dtype, launches]
    layer.compute_dtype, layer.compute_type_is_set = None, False
    counts = [CALLS.during(lambda: layer(x.float()))[1] for _ in range(2)]
    yield "first forward", [*counts, layer.compute_dtype == torch.float32]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield "autocast", CALLS.during(lambda: layer(x))[1]
    layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    yield "packed", CALLS.during(lambda: _runs(layer, x.float()))[1]
    with use_backend("torch"):
        yield "library backend", CALLS.during(lambda: _runs(layer, x.float()))[1]


def _runs(layer, x):
    # bitsandbytes multiplies with packed weights on some processors only; the question is what ours did
    with contextlib.suppress(RuntimeError, NotImplementedError):
        layer(x)


def models(folder):
    """Tokens that a whole model generates, and the gradients of a LoRA on it."""
    base = in_nf4(folder)
    forbid_packing(base)
    ids = token_batch(2, 5)

    def generated():
        return base.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)

    expected = generated()
    swapped = use_nf4_kernels(base)
    tokens, launches = CALLS.during(generated)
    yield "generation", [torch.equal(tokens, expected), tokens.shape[1], launches, swapped]

    model = get_peft_model(
        base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    ).train()

    def step():
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return [loss.detach()] + [p.grad.clone() for p in model.parameters() if p.requires_grad]

    use_nf4_kernels(model, enabled=False)
    theirs, none = CALLS.during(step)
    use_nf4_kernels(model)
    ours, launches = CALLS.during(step)
    worst = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    yield "LoRA", [worst, min(g.abs().max().item() for g in ours), launches, none]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer.step()
    yield "losses", [ours[0].item(), step()[0].item()]


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with use_backend("triton"):
        found = {**dict(layers()), **dict(types()), **dict(models(Path(sys.argv[1])))}
    print(json.dumps(found))
