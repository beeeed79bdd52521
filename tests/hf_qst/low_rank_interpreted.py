"""Runs `LowRankLinear` with its kernel in Triton's interpreter and prints what came out; a test starts it.

A process of its own, because `TRITON_INTERPRET` is read when Triton is imported and changes every kernel defined after.
"""

import json

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from hf_qst import LowRankLinear
from hf_qst_kernels import low_rank_linear, low_rank_triton, use_backend

LAUNCHES = []
_LAUNCH = low_rank_triton.multiply_pair


def counted(*args):
    LAUNCHES.append(args)
    _LAUNCH(*args)


low_rank_triton.multiply_pair = counted


def layer_of(inputs=48, rank=16, outputs=40, bias=True, dtype=torch.float32):
    torch.manual_seed(1)
    bias = torch.randn(outputs, dtype=dtype) if bias else None
    return LowRankLinear.from_factors(
        torch.randn(inputs, rank) / 7, torch.randn(rank, outputs) / 4, bias, dtype=dtype
    ).requires_grad_()


def run(module, x, backend):
    """Output, and the gradients of the input and of the parameters that train; how often the kernel ran."""
    LAUNCHES.clear()
    x = x.clone().requires_grad_()
    parameters = [p for p in module.parameters() if p.requires_grad]
    with use_backend(backend):
        y = module(x)
        gradients = torch.autograd.grad(y, [x, *parameters], torch.linspace(-1, 1, y.numel()).view(y.shape).to(y))
    return [y.detach(), *gradients], len(LAUNCHES)


def compared(module, x):
    twin, never = run(module, x, "torch")
    ours, launches = run(module, x, "triton")
    assert never == 0 and [t.dtype for t in ours] == [t.dtype for t in twin]
    errors = [
        ((a - b).abs().max() / b.abs().max()).nan_to_num(float("inf")).item() for a, b in zip(ours, twin, strict=True)
    ]
    return [max(errors), launches]


def tangent(layer, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x.flip(0)))).tangent


def gradients_of_each_row(layer, x):
    loss = lambda parameters, row: torch.func.functional_call(layer, parameters, (row,)).square().sum()
    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(dict(layer.named_parameters()), x)
    return torch.cat([gradient.flatten() for gradient in found.values()])


TRANSFORMS = {
    "vmap": lambda layer, x: torch.func.vmap(layer)(x),
    "jvp": lambda layer, x: torch.func.jvp(layer, (x,), (x.flip(0),))[1],
    "forward mode": tangent,
    "gradients of each row": gradients_of_each_row,
    "make_fx": lambda layer, x: make_fx(layer)(x)(x.flip(0)),
    "jit.trace": lambda layer, x: torch.jit.trace(layer, (x,), check_trace=False)(x.flip(0)),
}


def transformed(change, layer, x):
    """How far what torch's transform makes of a layer is from that without kernels, and the launches."""
    with use_backend("torch"):
        twin = change(layer, x)
    LAUNCHES.clear()
    with use_backend("triton"):
        return [(change(layer, x) - twin).abs().max().item(), len(LAUNCHES)]


def cases():
    x = torch.randn(2, 3, 48)
    yield "bias", compared(layer_of(), x)
    yield "no bias", compared(layer_of(bias=False), x)
    yield "odd sizes", compared(layer_of(45, 7, 33), torch.randn(5, 45))
    yield "one row", compared(layer_of(), torch.randn(48))
    yield "frozen factors", compared(layer_of().requires_grad_(False), x)
    yield "float32 inputs of bfloat16 factors", compared(layer_of(dtype=torch.bfloat16), x)
    yield "rank above the kernel's", compared(layer_of(96, 65, 80), torch.randn(2, 96))
    yield "no rows", [0.0, run(layer_of(), x[:, :0], "triton")[1]]
    with torch.no_grad():
        layer = layer_of()
        LAUNCHES.clear()
        with use_backend("triton"):
            layer(x)
            yield "without gradients", [0.0, len(LAUNCHES)]
            with torch.autocast("cpu", torch.bfloat16):
                layer(x)
        yield "autocast", [0.0, len(LAUNCHES) - 1]
    for name, register in {
        "forward hook": lambda m: m.up.register_forward_hook(lambda *_: _[-1] + 1),
        "forward pre-hook": lambda m: m.down.register_forward_pre_hook(lambda _, args: (2 * args[0],)),
        "backward hook": lambda m: m.down.register_full_backward_hook(lambda _, given, of_output: (3 * given[0],)),
    }.items():
        layer = layer_of()
        register(layer)
        yield name, compared(layer, x)
    model = nn.Sequential(layer_of())
    for target in ("0.down", "0.up"):
        tuned = get_peft_model(
            nn.Sequential(layer_of()), LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
        )
        yield f"LoRA on {target}", compared(tuned, x)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["0.up"], init_lora_weights=False)).merge_and_unload()
    yield "LoRA merged", compared(tuned.requires_grad_(), x)
    for name, change in TRANSFORMS.items():
        yield name, transformed(change, layer_of().requires_grad_(name == "gradients of each row"), x[0])
    down, up = layer.down.weight.detach(), layer.up.weight.detach()
    op = lambda x: low_rank_linear(x, down, up)
    for name in ("vmap", "forward mode", "make_fx", "jit.trace"):
        yield f"{name} of the op", transformed(TRANSFORMS[name], op, x[0])


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(json.dumps(dict(cases())))
