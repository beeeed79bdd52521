"""The halves of a side block as single autograd nodes, for blocks in the layout that most decoders have.

    q, k, v = rotated(N_1(x) W_qkv)                    heads
    h = x + a W_o,   y = h + MLP(N_2(h))               output_and_mlp

A side network is narrow and deep, so on a GPU its time is mostly kernel launches. As modules, a block launches three
times as many kernels, among them a cast of each weight and of its gradient under autocast, and autograd keeps all
intermediate results. Here the weights of one product are cast into one matrix, and the gradients are written by hand from
the inputs of each half; with `recompute` nothing else is kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from hf_qst.base_model.bare_calls import are_bare
from hf_qst_kernels.dispatch import autocast_dtype

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


def fuses(block: nn.Module, hidden: torch.Tensor) -> bool:
    """Whether these functions can run a `SideBlock`: its layout is supported, and nothing needs its modules to be called,
    such as hooks (of FSDP, ZeRO or a user), a compiler or a trace.
    """
    spec = block.attention.spec
    if spec.parallel is not None or spec.post_norms or spec.activation not in ACTIVATIONS:
        return False
    return are_bare(hidden, *block.fused_parts)


def heads(
    x: torch.Tensor, norm: nn.Module, layers: list[nn.Linear], head_dim: int, tables: tuple | None
) -> tuple[torch.Tensor, ...]:
    """`layer(norm(x))` of the layers for query, key and value, as [batch, seq, heads, head_dim]; keeps x for backward.

    Args:
        x: [batch, seq, d_s].
        tables: cos and sin [batch, seq, 1, n], by which the first n channels of queries and keys are rotated.
    """
    node = _Heads(norm, layers, head_dim, x)
    if torch.is_grad_enabled():
        return _HeadsFunction.apply(x, node, *(tables or (None, None)), *_tensors(norm), *_tensors(*layers))
    return node.forward(x, tables)[0]


def output_and_mlp(
    attended: torch.Tensor, x: torch.Tensor, output: nn.Linear, norm: nn.Module, mlp: nn.Module, recompute: bool
) -> torch.Tensor:
    """`h + mlp(norm(h))` with `h = x + output(attended)`; x [batch, seq, d_s].

    Args:
        mlp (`SideMLP`)
        recompute: keep only `attended` and `h` for the backward pass; else also the products inside the MLP.
    """
    node = _OutputAndMLP(output, norm, mlp, x, recompute)
    if torch.is_grad_enabled():
        tensors = [*_tensors(output), *_tensors(norm), *_tensors(*node.inner.layers), *_tensors(mlp.down_proj)]
        return _OutputAndMLPFunction.apply(attended, x, node, *tensors)
    return node.forward(attended, x)[0]


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


def _turn(x, cos, sin, sign: int, out=None) -> torch.Tensor:
    """`(x1 c1 - x2 s1, x2 c2 + x1 s2)`, or with `sign` -1 its transpose."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    n = cos.shape[-1]
    (c1, c2), (s1, s2) = cos.chunk(2, -1), sin.chunk(2, -1)[::sign]
    first, second = x[..., : n // 2], x[..., n // 2 : n]
    torch.mul(first, c1, out=out[..., : n // 2]).addcmul_(second, s1, value=-sign)
    torch.mul(second, c2, out=out[..., n // 2 : n]).addcmul_(first, s2, value=sign)
    if n < x.shape[-1]:
        out[..., n:] = x[..., n:]
    return out


def _tensors(*modules: nn.Module) -> list[torch.Tensor | None]:
    """Weight and bias of each module, passed to a node so that autograd gets their gradients."""
    return [tensor for module in modules for tensor in (module.weight, getattr(module, "bias", None))]


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of a block's products: autocast's if it is enabled, else that of x."""
    return autocast_dtype(x.device.type) or x.dtype


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


class _Norm:
    """RMSNorm or LayerNorm over the last axis, and its gradients."""

    def __init__(self, module: nn.Module):
        self.weight, self.bias, self.eps = module.weight, getattr(module, "bias", None), module.eps
        self.layer = isinstance(module, nn.LayerNorm)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list]:
        """The result, and the statistics for `backward`."""
        shape = [x.shape[-1]]
        if self.layer:
            y, *stats = _aten.native_layer_norm(x, shape, self.weight, self.bias, self.eps)
        elif x.is_cuda:
            y, *stats = _aten._fused_rms_norm(x, shape, self.weight, self.eps)
        else:
            y, stats = F.rms_norm(x, shape, self.weight, self.eps), []
        return y, stats

    def backward(self, grad, x, stats):
        """Gradients in x, weight and bias."""
        grad, shape = grad.to(x.dtype), [x.shape[-1]]
        if self.layer:
            needed = [True, True, self.bias is not None]
            return _aten.native_layer_norm_backward(grad, x, shape, *stats, self.weight, self.bias, needed)
        if x.is_cuda:
            return *_aten._fused_rms_norm_backward(grad, x, shape, *stats, self.weight, [True, True]), None
        wide = torch.promote_types(x.dtype, torch.float32)
        g, x_wide = grad.to(wide), x.to(wide)
        rstd = (x_wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        normal = x_wide * rstd
        of_weight = (g * normal).sum(0)
        g = g * self.weight
        dx = rstd * (g - normal * (g * normal).mean(-1, keepdim=True))
        return dx.to(x.dtype), of_weight.to(self.weight.dtype), None


class _Products:
    """Linear layers with one input, in autocast's dtype. If their weights have to be cast, they are packed into one
    product."""

    def __init__(self, layers: list[nn.Linear], x: torch.Tensor):
        self.layers = layers
        self.dtype = product_dtype(x)
        self.sizes = [layer.weight.shape[0] for layer in layers]
        self.packed = layers[0].weight.dtype != self.dtype

    def forward(self, rows: torch.Tensor, weights: list[torch.Tensor]) -> list[torch.Tensor]:
        """Output [rows, size] of each layer, or one tensor with all columns if the weights are packed."""
        outputs = [torch.mm(rows, weight.t()) for weight in weights]
        for layer, output in zip(self.layers, self.split(outputs), strict=True):
            if layer.bias is not None:
                output += layer.bias
        return outputs

    def split(self, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Views of the result of `forward` by layer."""
        return list(outputs[0].split(self.sizes, -1)) if self.packed else outputs

    def backward(self, grads: list[torch.Tensor], rows: torch.Tensor, weights: list[torch.Tensor]):
        """Gradient in `rows`, and of each layer's weight and bias in turn; `grads` has the layout of `forward`'s result."""
        total = None
        for grad, weight in zip(grads, weights, strict=True):
            total = torch.mm(grad, weight) if total is None else total.addmm_(grad, weight)
        dtype = self.layers[0].weight.dtype
        of_weights = [product(grad.t(), rows, dtype) for grad in grads]
        if self.packed:
            of_weights = of_weights[0].split(self.sizes)
        of_layers = []
        for layer, of_weight, grad in zip(self.layers, of_weights, self.split(grads), strict=True):
            of_layers += [of_weight, None if layer.bias is None else grad.sum(0, dtype=layer.bias.dtype)]
        return total, of_layers


def _cast_weights(*groups: _Products) -> list[list[torch.Tensor]]:
    """The matrices of each group: one packed matrix in the dtype of the product, or the layers' own weights."""
    own = [[layer.weight.detach() for layer in group.layers] for group in groups]
    if not groups[0].packed:
        return own
    matrices, views = [], []
    for group, weights in zip(groups, own, strict=True):
        matrix = torch.empty(sum(group.sizes), weights[0].shape[1], dtype=group.dtype, device=weights[0].device)
        matrices.append([matrix])
        views += matrix.split(group.sizes)
    torch._foreach_copy_(views, [weight for weights in own for weight in weights])
    return matrices


def product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`a @ b` in `dtype`, on a GPU without an intermediate rounding."""
    if a.dtype == dtype or not a.is_cuda or dtype != torch.float32:
        return torch.mm(a, b).to(dtype)
    return torch.mm(a, b, out_dtype=dtype)


class _Heads:
    """The first half of a block, up to the attention."""

    def __init__(self, norm: nn.Module, layers: list[nn.Linear], head_dim: int, x: torch.Tensor):
        self.norm, self.products, self.head_dim = _Norm(norm), _Products(layers, x), head_dim
        self.shape = x.shape

    def forward(self, x: torch.Tensor, tables: tuple | None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Query, key and value, and the weights in use."""
        with torch.autocast(x.device.type, enabled=False):
            (weights,) = _cast_weights(self.products)
            normal, _ = self.norm.forward(_rows(x))
            outputs = self.products.forward(normal.to(self.products.dtype), weights)
            if tables is None:
                return [self.by_head(part) for part in self.products.split(outputs)], weights
            query, key, value = self.products.split(outputs)
            if self.products.packed:  # side by side: rotated at once
                turned = _turn(self.by_head(outputs[0][:, : -value.shape[1]]), *tables, 1)
                query, key = turned.split([part.shape[1] // self.head_dim for part in (query, key)], 2)
            else:
                query, key = (_turn(self.by_head(part), *tables, 1) for part in (query, key))
            return [query, key, self.by_head(value)], weights

    def by_head(self, part: torch.Tensor) -> torch.Tensor:
        return part.view(*self.shape[:-1], -1, self.head_dim)

    def backward(self, grads: list[torch.Tensor], x, weights, tables):
        """Gradients in x and in the parameters, in the order of the call."""
        products, rows = self.products, _rows(x)
        grads = [grad.reshape(-1, size) for grad, size in zip(grads, products.sizes, strict=True)]
        if products.packed:
            grads = [torch.cat(grads, 1)]
        if tables is not None:
            if products.packed:
                turned, values = torch.empty_like(grads[0]), -products.sizes[2]
                _turn(self.by_head(grads[0][:, :values]), *tables, -1, self.by_head(turned[:, :values]))
                turned[:, values:] = grads[0][:, values:]
                grads = [turned]
            else:
                grads[:2] = [_rows(_turn(self.by_head(grad), *tables, -1).flatten(-2)) for grad in grads[:2]]
        normal, stats = self.norm.forward(rows)
        of_normal, of_layers = products.backward(grads, normal.to(products.dtype), weights)
        dx, *of_norm = self.norm.backward(of_normal, rows, stats)
        return dx.view(x.shape), [*of_norm, *of_layers]


class _HeadsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, node: _Heads, cos, sin, *tensors):
        tables = None if cos is None else (cos, sin)
        outputs, weights = node.forward(x, tables)
        ctx.node, ctx.packed = node, len(weights) if node.products.packed else 0
        ctx.save_for_backward(x, cos, sin, *weights[: ctx.packed], *tensors)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, cos, sin, *rest = ctx.saved_tensors
        node, tensors = ctx.node, rest[ctx.packed :]
        weights = rest[: ctx.packed] or [tensors[2 + 2 * i].detach() for i in range(len(node.products.layers))]
        with torch.autocast(x.device.type, enabled=False):
            dx, of_parameters = node.backward(grads, x, weights, None if cos is None else (cos, sin))
        return dx, None, None, None, *of_parameters


class _OutputAndMLP:
    """The second half of a block, after the attention."""

    def __init__(self, output: nn.Linear, norm: nn.Module, mlp: nn.Module, x: torch.Tensor, recompute: bool):
        self.norm, self.recompute = _Norm(norm), recompute
        self.output, self.down = _Products([output], x), _Products([mlp.down_proj], x)
        self.inner = _Products([part for part in (mlp.gate_proj, mlp.up_proj) if part is not None], x)
        self.groups = self.output, self.inner, self.down
        self.activate, self.activate_backward = ACTIVATIONS[mlp.activation_name]

    def forward(self, attended, x):
        """The result, `h` [rows, d_s], the products inside the MLP, and the weights in use."""
        with torch.autocast(x.device.type, enabled=False):
            weights = _cast_weights(*self.groups)
            (added,) = self.output.forward(_rows(attended).to(self.output.dtype), weights[0])
            h = _rows(x) + added
            normal, _ = self.norm.forward(h)
            inside = self.inner.forward(normal.to(self.inner.dtype), weights[1])
            (y,) = self.down.forward(self.gated(inside), weights[2])
            return (h + y).view(x.shape), h, inside, weights

    def gated(self, inside: list[torch.Tensor]) -> torch.Tensor:
        gate, *up = self.inner.split(inside)
        return self.activate(gate).mul_(up[0]) if up else self.activate(gate)

    def gated_backward(self, grad, inside: list[torch.Tensor]) -> list[torch.Tensor]:
        """Gradients in the products inside the MLP, in the same layout."""
        gate, *up = self.inner.split(inside)
        if not up:
            return [self.activate_backward(grad, gate)]
        of_gate, of_up = self.activate_backward(grad * up[0], gate), grad * self.activate(gate)
        return [torch.cat((of_gate, of_up), 1)] if self.inner.packed else [of_gate, of_up]

    def backward(self, grad, attended, h, inside, weights):
        """Gradients in `attended`, `x`, and the parameters in the order of the call."""
        grad = _rows(grad)
        normal, stats = self.norm.forward(h)
        normal = normal.to(self.inner.dtype)
        inside = inside or self.inner.forward(normal, weights[1])
        of_gated, of_down = self.down.backward([grad.to(self.down.dtype)], self.gated(inside), weights[2])
        of_normal, of_inner = self.inner.backward(self.gated_backward(of_gated, inside), normal, weights[1])
        of_h, *of_norm = self.norm.backward(of_normal, h, stats)
        of_h = of_h + grad
        rows = _rows(attended).to(self.output.dtype)
        of_rows, of_output = self.output.backward([of_h.to(self.output.dtype)], rows, weights[0])
        return of_rows.to(attended.dtype).view(attended.shape), of_h, [*of_output, *of_norm, *of_inner, *of_down]


class _OutputAndMLPFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, attended, x, node: _OutputAndMLP, *tensors):
        y, h, inside, weights = node.forward(attended, x)
        kept = [] if node.recompute else inside
        packed = [matrix for (matrix,) in weights] if node.inner.packed else []
        ctx.node, ctx.shape, ctx.inside, ctx.packed = node, x.shape, len(kept), len(packed)
        ctx.save_for_backward(attended, h, *kept, *packed, *tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        attended, h, *rest = ctx.saved_tensors
        inside, rest = rest[: ctx.inside], rest[ctx.inside :]
        packed, tensors = rest[: ctx.packed], rest[ctx.packed :]
        matrices = iter(packed or [t.detach() for t in (tensors[0], *tensors[4::2])])
        weights = [[next(matrices) for _ in range(1 if packed else len(g.layers))] for g in ctx.node.groups]
        with torch.autocast(h.device.type, enabled=False):
            of_attended, of_x, of_parameters = ctx.node.backward(grad, attended, h, inside, weights)
        return of_attended, of_x.view(ctx.shape), None, *of_parameters
