"""The halves of a side block as single autograd nodes, for blocks in the layout that most decoders have.

    q, k, v = N_1(x) W_qkv            norm_linear
    h = x + a W_o,  y = h + MLP(N_2(h))      output_and_mlp

A side network is narrow and deep: on a GPU its time is that of starting operations, not of computing them. Written as
modules, a block starts three times as many, among them a cast of each weight and of its gradient under autocast, and
autograd keeps what lies between. Here the weights of one product are cast into one matrix, gradients are computed by
hand, and of each half its inputs are kept (with `recompute`) and what follows from them is computed again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from hf_qst_kernels.dispatch import autocast_dtype, every_operation_counts

_aten = torch.ops.aten
# Activations by transformers' names: the function, and its gradient from the incoming one and the input.
ACTIVATIONS = {
    "silu": (F.silu, _aten.silu_backward),
    "gelu": (F.gelu, _aten.gelu_backward),
    "gelu_new": (lambda x: F.gelu(x, approximate="tanh"), lambda g, x: _aten.gelu_backward(g, x, approximate="tanh")),
    "relu": (F.relu, lambda g, x: _aten.threshold_backward(g, x, 0)),
}
ACTIVATIONS["swish"] = ACTIVATIONS["silu"]
ACTIVATIONS["gelu_pytorch_tanh"] = ACTIVATIONS["gelu_new"]
_PLAIN = (torch.Tensor, nn.Parameter)


def fuses(block: nn.Module, hidden: torch.Tensor) -> bool:
    """
    Whether a `SideBlock` may run through this module: its layout is the one written here, and nothing else has to see
    its parts. Hooks on them (FSDP's, ZeRO's, a user's), a compiler and a trace need the modules.
    """
    spec = block.attention.spec
    if spec.parallel is not None or spec.post_norms or spec.activation not in ACTIVATIONS:
        return False
    if torch.compiler.is_compiling() or every_operation_counts() or type(hidden) not in _PLAIN:
        return False
    dtype = hidden.dtype
    for part in block.fused_parts:
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
            return False
        if "forward" in part.__dict__:  # accelerate's hooks replace it
            return False
        for parameter in part._parameters.values():
            if parameter is not None and (type(parameter) not in _PLAIN or parameter.dtype != dtype):
                return False
    return True


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first `n` channels of x [batch, seq, heads, head_dim]; cos, sin [batch, seq, 1, n]."""
    return _Rotation.apply(x, cos, sin) if torch.is_grad_enabled() and x.requires_grad else _turn(x, cos, sin, 1)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _turn(grad, *ctx.saved_tensors, -1), None, None


def _turn(x, cos, sin, sign: int) -> torch.Tensor:
    """`(x1 c1 - x2 s1, x2 c2 + x1 s2)`, or with `sign` -1 the transposed map of it."""
    out, n = torch.empty(x.shape, dtype=x.dtype, device=x.device), cos.shape[-1]
    half = n // 2
    first, second = x[..., :half], x[..., half:n]
    s1, s2 = (sin[..., :half], sin[..., half:])[::sign]
    torch.mul(first, cos[..., :half], out=out[..., :half]).addcmul_(second, s1, value=-sign)
    torch.mul(second, cos[..., half:], out=out[..., half:n]).addcmul_(first, s2, value=sign)
    if n < x.shape[-1]:
        out[..., n:] = x[..., n:]
    return out


def norm_linear(x: torch.Tensor, norm: nn.Module, layers: list[nn.Linear]) -> tuple[torch.Tensor, ...]:
    """`[layer(norm(x)) for layer in layers]` for x [..., dim], keeping x alone for backward."""
    arguments = x, _Norm(norm), _Products(layers, x), *_tensors(norm), *_tensors(*layers)
    if torch.is_grad_enabled():
        return _NormLinear.apply(*arguments)
    return _norm_linear(*arguments)


def output_and_mlp(
    attended: torch.Tensor, x: torch.Tensor, output: nn.Linear, norm: nn.Module, mlp: nn.Module, recompute: bool
) -> torch.Tensor:
    """
    `h + mlp(norm(h))` with `h = x + output(attended)`; x [batch, seq, d_s].

    Args:
        mlp (`SideMLP`)
        recompute: keep `attended` and `h` alone; else also what the MLP's inner product gave.
    """
    inner = [mlp.up_proj] if mlp.gate_proj is None else [mlp.gate_proj, mlp.up_proj]
    half = _Half(
        _Norm(norm), _Products([output], x), _Products(inner, x), _Products([mlp.down_proj], x), mlp, recompute
    )
    arguments = attended, x, half, *_tensors(output), *_tensors(norm), *_tensors(*inner), *_tensors(mlp.down_proj)
    if torch.is_grad_enabled():
        return _OutputAndMLP.apply(*arguments)
    return half.forward(attended, x)[0]


def _tensors(*modules: nn.Module) -> list[torch.Tensor | None]:
    """Weight and bias of each: given to a node so that autograd takes their gradients from it."""
    return [tensor for module in modules for tensor in (module.weight, getattr(module, "bias", None))]


class _Norm:
    """RMSNorm or LayerNorm over the last axis, and its gradients."""

    def __init__(self, module: nn.Module):
        self.weight, self.bias, self.eps = module.weight, getattr(module, "bias", None), module.eps
        self.layer = isinstance(module, nn.LayerNorm)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple]:
        """The result, and the statistics that `backward` wants."""
        shape = [x.shape[-1]]
        if self.layer:
            y, *stats = _aten.native_layer_norm(x, shape, self.weight, self.bias, self.eps)
        elif x.is_cuda:
            y, *stats = _aten._fused_rms_norm(x, shape, self.weight, self.eps)
        else:
            y, stats = F.rms_norm(x, shape, self.weight, self.eps), []
        return y, tuple(stats)

    def backward(self, grad, x, stats):
        """Gradients in x, weight and bias; `grad` in x's dtype."""
        shape = [x.shape[-1]]
        if self.layer:
            needed = [True, True, self.bias is not None]
            return _aten.native_layer_norm_backward(grad, x, shape, *stats, self.weight, self.bias, needed)
        if x.is_cuda:
            return *_aten._fused_rms_norm_backward(grad, x, shape, *stats, self.weight, [True, True]), None
        wide = torch.promote_types(x.dtype, torch.float32)
        g, x_wide = grad.to(wide), x.to(wide)
        rstd = (x_wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        normal = x_wide * rstd
        grad_weight = (g * normal).sum(0)
        g = g * self.weight
        dx = rstd * (g - normal * (g * normal).mean(-1, keepdim=True))
        return dx.to(x.dtype), grad_weight.to(self.weight.dtype), None


class _Products:
    """Several linear layers of one input, in the dtype that autocast asks for: one product where their weights have to
    be cast in any case, else one each."""

    def __init__(self, layers: list[nn.Linear], x: torch.Tensor):
        self.layers = layers
        self.dtype = autocast_dtype(x.device.type) or layers[0].weight.dtype
        self.sizes = [layer.weight.shape[0] for layer in layers]
        self.packed = layers[0].weight.dtype != self.dtype

    def weights(self) -> list[torch.Tensor]:
        """One matrix of all the layers' rows, or theirs."""
        own = [layer.weight.detach() for layer in self.layers]
        if not self.packed:
            return own
        packed = torch.empty(sum(self.sizes), own[0].shape[1], dtype=self.dtype, device=own[0].device)
        torch._foreach_copy_(list(packed.split(self.sizes)), own)
        return [packed]

    def forward(self, rows: torch.Tensor, weights: list[torch.Tensor]) -> list[torch.Tensor]:
        """Outputs [rows, size] of each layer."""
        outputs = [torch.mm(rows, weight.t()) for weight in weights]
        if self.packed:
            outputs = list(outputs[0].split(self.sizes, -1))
        for layer, output in zip(self.layers, outputs, strict=True):
            if layer.bias is not None:
                output += layer.bias
        return outputs

    def backward(self, grads: list[torch.Tensor], rows: torch.Tensor, weights: list[torch.Tensor], needs_rows=True):
        """The gradient in `rows`, and those of each layer's weight and bias, in turn."""
        grads = [grad.reshape(-1, size).to(self.dtype) for grad, size in zip(grads, self.sizes, strict=True)]
        if self.packed:
            grads = [torch.cat(grads, 1) if len(grads) > 1 else grads[0]]
        total = None
        for grad, weight in zip(grads, weights, strict=True) if needs_rows else ():
            total = torch.mm(grad, weight) if total is None else total.addmm_(grad, weight)
        of_weights = [_product(grad.t(), rows, self.layers[0].weight.dtype) for grad in grads]
        if self.packed:
            of_weights, grads = of_weights[0].split(self.sizes), grads[0].split(self.sizes, -1)
        of_layers = []
        for layer, of_weight, grad in zip(self.layers, of_weights, grads, strict=True):
            of_layers += [of_weight, None if layer.bias is None else grad.sum(0, dtype=layer.bias.dtype)]
        return total, of_layers


def _product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`a @ b` in `dtype`, without a copy in between where the device can."""
    if a.dtype == dtype or not a.is_cuda or dtype != torch.float32:
        return torch.mm(a, b).to(dtype)
    return torch.mm(a, b, out_dtype=dtype)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def _norm_linear(x, norm, products, *_):
    with torch.autocast(x.device.type, enabled=False):
        normal, _ = norm.forward(_rows(x))
        outputs = products.forward(normal.to(products.dtype), products.weights())
    return tuple(output.view(*x.shape[:-1], -1) for output in outputs)


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm, products, *tensors):
        ctx.norm, ctx.products = norm, products
        ctx.save_for_backward(x, *tensors)
        return _norm_linear(x, norm, products)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, *_ = ctx.saved_tensors
        rows = _rows(x)
        with torch.autocast(x.device.type, enabled=False):
            normal, stats = ctx.norm.forward(rows)
            grad, of_layers = ctx.products.backward(grads, normal.to(ctx.products.dtype), ctx.products.weights())
            dx, *of_norm = ctx.norm.backward(grad.to(rows.dtype), rows, stats)
        return dx.view(x.shape), None, None, *of_norm, *of_layers


class _Half:
    """The second half of a block."""

    def __init__(self, norm, output: _Products, inner: _Products, down: _Products, mlp, recompute: bool):
        self.norm, self.output, self.inner, self.down, self.recompute = norm, output, inner, down, recompute
        self.activate, self.activate_backward = ACTIVATIONS[mlp.activation_name]

    def forward(self, attended, x):
        """The result, `h` [rows, d_s] and the products inside the MLP."""
        with torch.autocast(x.device.type, enabled=False):
            (added,) = self.output.forward(_rows(attended).to(self.output.dtype), self.output.weights())
            h = _rows(x) + added
            normal, _ = self.norm.forward(h)
            inside = self.inner.forward(normal.to(self.inner.dtype), self.inner.weights())
            (y,) = self.down.forward(self.gated(inside), self.down.weights())
            return (h + y).view(x.shape), h, inside

    def gated(self, inside: list[torch.Tensor]) -> torch.Tensor:
        active = self.activate(inside[0])
        return active if len(inside) == 1 else active.mul_(inside[1])

    def backward(self, grad, attended, h, inside):
        """Gradients in `attended`, `x`, and the parameters in the order of the call."""
        grad = grad.reshape(-1, grad.shape[-1])
        normal, stats = self.norm.forward(h)
        normal = normal.to(self.inner.dtype)
        if inside is None:
            inside = self.inner.forward(normal, self.inner.weights())
        of_gated, of_down = self.down.backward([grad], self.gated(inside), self.down.weights())
        if len(inside) == 1:
            of_inside = [self.activate_backward(of_gated, inside[0])]
        else:
            gate, up = inside
            of_inside = [self.activate_backward(of_gated * up, gate), of_gated * self.activate(gate)]
        of_normal, of_inner = self.inner.backward(of_inside, normal, self.inner.weights())
        of_h, *of_norm = self.norm.backward(of_normal.to(h.dtype), h, stats)
        of_h = of_h + grad
        rows = _rows(attended).to(self.output.dtype)
        of_rows, of_output = self.output.backward([of_h], rows, self.output.weights())
        return of_rows.to(attended.dtype).view(attended.shape), of_h, [*of_output, *of_norm, *of_inner, *of_down]


class _OutputAndMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, attended, x, half, *tensors):
        y, h, inside = half.forward(attended, x)
        ctx.half, ctx.shape = half, x.shape
        ctx.save_for_backward(attended, h, *([] if half.recompute else inside), *tensors)
        ctx.inside = 0 if half.recompute else len(inside)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        attended, h, *rest = ctx.saved_tensors
        with torch.autocast(h.device.type, enabled=False):
            of_attended, of_x, of_parameters = ctx.half.backward(grad, attended, h, rest[: ctx.inside] or None)
        return of_attended, of_x.view(ctx.shape), None, *of_parameters
