"""Side blocks B_i: decoder blocks with the base block's shapes at the side network's width (paper, section 3.1).

One class serves all architectures. It takes norm, activation, biases, rotary part and residual layout from the base's
`BlockSpec`, so parameter counts equal those of the base's own block at that width. The base's layer classes are not used,
because they look up settings by layer number, and transformers records hidden states by these classes.

Attention mask and rotary tables are those of the base's block in the same call. So padding, packing, sliding windows and
static caches work without a mask built here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_qst.base_model.decoder_stack import BlockSpec
from hf_qst.qst import fused_block


@dataclass
class BlockContext:
    """The arguments of one base block except the hidden state, for its side block."""

    attention_mask: object = None
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None
    attention_kwargs: dict = field(default_factory=dict)
    hidden_dtype: torch.dtype = torch.float32
    # Of the tables' rows those for the states of this call, the last (0: all); an indexer has them of earlier ones too.
    length: int = 0
    # Rotary tables at the side network's size, shared by the blocks of one forward pass.
    side_tables: dict = field(default_factory=dict)

    def rotary(
        self, spec: BlockSpec, device: torch.device, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """cos and sin [batch, seq, 1, rotary_dim] for a side block; None for one without positions."""
        if not spec.rotary_dim or self.position_embeddings is None:
            return None
        if torch.compiler.is_compiling():
            return self._side_tables(spec, device, dtype)
        key = id(self.position_embeddings), device, dtype
        if key not in self.side_tables:
            self.side_tables[key] = self._side_tables(spec, device, dtype)
        return self.side_tables[key]

    def _side_tables(self, spec: BlockSpec, device: torch.device, dtype: torch.dtype) -> tuple:
        tables = side_rotary(self.position_embeddings, spec)
        return tuple(table[..., -self.length :, :].to(device, dtype).unsqueeze(-2) for table in tables)


def reduction(base: BlockSpec, side_heads: str) -> int:
    """The reduction factor of a side network as wide as possible near a sixth of the base.

    Heads have 32 channels or more, or as many as the base's where these are smaller: narrower ones attend to little.
    """
    least = min(32, base.head_dim)
    fits = []
    for r in (r for r in range(1, base.hidden_size + 1) if base.hidden_size % r == 0):
        try:
            spec = side_spec(base, r, side_heads)
        except ValueError:
            continue
        fits.append((spec.head_dim < least, abs(math.log(r / 6)), r))
    if not fits:
        raise ValueError(
            f"QSTConfig.r=None finds no width for a base {base.hidden_size} wide with heads of {base.head_dim}"
        )
    return min(fits)[-1]


def side_spec(base: BlockSpec, r: int, side_heads: str) -> BlockSpec:
    """The spec of a block `r` times narrower.

    With `side_heads="auto"` a head keeps its size, or takes its largest even divisor that divides the side width; rotary
    tables are then sub-sampled. With `"keep"` the number of heads stays and their size is divided by `r`.

    Raises:
        ValueError: `r` does not divide the hidden size, or no head size fits the side width.
    """
    if base.hidden_size % r:
        raise ValueError(f"QSTConfig.r must divide the base's hidden size {base.hidden_size}, got {r}")
    width = base.hidden_size // r
    if side_heads == "keep":
        sizes = [base.head_dim // r] if base.head_dim % r == 0 else []
    else:
        sizes = [base.head_dim // part for part in range(1, base.head_dim // 2 + 1) if base.head_dim % part == 0]
        sizes = [size for size in sizes if width % size == 0]
    sizes = [size for size in sizes if _can_rotate(base, size)]
    if not sizes:
        raise ValueError(
            f"QSTConfig.r={r} with side_heads={side_heads!r} leaves a side width of {width} for which no even head size "
            f"exists that divides both it and the base's head size {base.head_dim}. Choose another r."
        )
    head_dim = sizes[0]
    part = base.head_dim // head_dim
    if side_heads == "keep":
        heads, kv_heads = base.num_heads, base.num_kv_heads
    else:
        heads = width // head_dim
        most = max(1, heads * base.num_kv_heads // base.num_heads)
        kv_heads = max(n for n in range(1, most + 1) if heads % n == 0)
    return replace(
        base,
        hidden_size=width,
        intermediate_size=max(1, base.intermediate_size // r),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=base.rotary_dim // part,
    )


def _can_rotate(base: BlockSpec, head_dim: int) -> bool:
    part = base.head_dim // head_dim
    return head_dim % 2 == 0 and base.rotary_dim % (2 * part) == 0


def side_rotary(tables, spec: BlockSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary tables [batch, seq, spec.rotary_dim] of a smaller head, from the base's in the layout `spec.rotary`.

    Frequency j of a head of n channels is theta ** (-2j / n). So a head of n / k channels has every k-th frequency of the
    base; scaled variants are sub-sampled in the same way. The side network rotates halves, whatever its base does: its
    queries and keys are its own.
    """
    wanted = spec.rotary_dim // 2
    frequencies = _frequencies(tables, spec)
    part = max(1, frequencies[0].shape[-1] // wanted)
    return tuple(torch.cat((t[..., ::part][..., :wanted],) * 2, dim=-1) for t in frequencies)


def _frequencies(tables, spec: BlockSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [batch, seq, n / 2] of a base head's n rotated channels, each frequency once."""
    if spec.rotary == "complex":
        return tables.real, tables.imag
    if spec.rotary == "half":
        return tables
    if spec.rotary == "interleaved":
        return tuple(t[..., ::2] for t in tables)
    return tuple(t[..., : t.shape[-1] // 2] for t in tables)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first `cos.shape[-1]` channels of x [batch, seq, heads, head_dim]; cos, sin [batch, seq, 1, n]."""
    n = cos.shape[-1]
    turned, rest = x[..., :n], x[..., n:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return turned if rest.shape[-1] == 0 else torch.cat((turned, rest), dim=-1)


def make_norm(kind: str, size: int, eps: float) -> nn.Module:
    """RMSNorm (`kind="rms"`) or LayerNorm, initialised to weight one."""
    return nn.RMSNorm(size, eps=eps) if kind == "rms" else nn.LayerNorm(size, eps=eps)


class SideAttention(nn.Module):
    """Causal self-attention at the side width, through transformers' attention interface.

    Args:
        spec: of the side block.
        base_config: the base's config; its attention implementation is read at each call.
        sliding_window: of the base block, or None.
    """

    is_causal = True

    def __init__(self, spec: BlockSpec, base_config, sliding_window: int | None):
        super().__init__()
        self.spec = spec
        self.config = base_config
        self.sliding_window = sliding_window
        self.num_key_value_groups = spec.num_heads // spec.num_kv_heads
        query, key = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.q_proj = nn.Linear(spec.hidden_size, query, bias=spec.qkv_bias)
        self.k_proj = nn.Linear(spec.hidden_size, key, bias=spec.qkv_bias)
        self.v_proj = nn.Linear(spec.hidden_size, key, bias=spec.qkv_bias)
        self.o_proj = nn.Linear(query, spec.hidden_size, bias=spec.out_bias)
        self.q_norm = make_norm(spec.norm, spec.head_dim, spec.norm_eps) if spec.qk_norm else None
        self.k_norm = make_norm(spec.norm, spec.head_dim, spec.norm_eps) if spec.qk_norm else None

    def forward(self, hidden: torch.Tensor, context: BlockContext, cache=None, layer_idx: int = 0) -> torch.Tensor:
        """[batch, seq, d_s] -> [batch, seq, d_s]; `layer_idx` is this block's layer in `cache`."""
        query, key, value = (
            layer(hidden).unflatten(-1, (-1, self.spec.head_dim)) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None:
            query, key = self.q_norm(query).to(value.dtype), self.k_norm(key).to(value.dtype)
        tables = context.rotary(self.spec, query.device, query.dtype)
        if tables is not None:
            query, key = _rotate(query, *tables), _rotate(key, *tables)
        return self.o_proj(self.attend(query, key, value, context, cache, layer_idx))

    def attend(self, query, key, value, context: BlockContext, cache, layer_idx: int) -> torch.Tensor:
        """Attention of query, key and value [batch, seq, heads, head_dim], before the output projection."""
        shape = (*query.shape[:-2], -1)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, layer_idx)

        mask, kind = context.attention_mask, self.config._attn_implementation
        if isinstance(mask, torch.Tensor):
            # Some bases give one mask for each of their heads; the side network has other heads.
            mask = mask[:, :1] if mask.dim() == 4 else mask
            mask = mask.to(query.device, query.dtype if mask.is_floating_point() else mask.dtype)
        result_dtype = query.dtype
        if kind in ("eager", "sdpa"):
            # Both take a boolean or additive mask of four dimensions, and sdpa is the fused one.
            kind = "sdpa"
        else:
            # The mask is in that kernel's own format, and such kernels take only half precision.
            half = context.hidden_dtype
            query, key, value = query.to(half), key.to(half), value.to(half)
        output, _ = ALL_ATTENTION_FUNCTIONS[kind](
            self,
            query,
            key,
            value,
            mask,
            dropout=self.spec.attention_dropout if self.training else 0.0,
            scaling=self.spec.head_dim**-0.5,
            sliding_window=self.sliding_window,
            **context.attention_kwargs,
        )
        return output.reshape(shape).to(result_dtype)


class SideMLP(nn.Module):
    """Gated or plain MLP at the side width, [batch, seq, d_s] -> [batch, seq, d_s]."""

    def __init__(self, spec: BlockSpec):
        super().__init__()
        self.gate_proj = (
            nn.Linear(spec.hidden_size, spec.intermediate_size, bias=spec.mlp_bias) if spec.gated_mlp else None
        )
        self.up_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=spec.mlp_bias)
        self.down_proj = nn.Linear(spec.intermediate_size, spec.hidden_size, bias=spec.mlp_bias)
        self.activation_name = spec.activation
        self.activation = ACT2FN[spec.activation]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(hidden)))
        return self.down_proj(self.activation(self.gate_proj(hidden)) * self.up_proj(hidden))


class _Recomputed(torch.autograd.Function):
    """`function(x)`, of which only x is kept: backward runs it again. For functions without randomness.

    `torch.utils.checkpoint` does the same for any function, but its overhead is large for a function this small.
    `parameters` are those that the function uses; they are arguments so that autograd gets their gradients.
    """

    @staticmethod
    def forward(ctx, function, x, *parameters):
        ctx.function = function
        kind = x.device.type
        ctx.autocast = {"device_type": kind, "enabled": torch.is_autocast_enabled(kind)}
        ctx.autocast["dtype"] = torch.get_autocast_dtype(kind)
        ctx.save_for_backward(x, *parameters)
        return function(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, *parameters = ctx.saved_tensors
        x = x.detach().requires_grad_(ctx.needs_input_grad[1])
        inputs = [t for t, needed in zip((x, *parameters), ctx.needs_input_grad[1:], strict=True) if needed]
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            output = ctx.function(x)
        gradients = iter(torch.autograd.grad(output, inputs, grad))
        return None, *(next(gradients) if needed else None for needed in ctx.needs_input_grad[1:])


class SideBlock(nn.Module):
    """One decoder block of the side network, in the residual layout of the base's."""

    def __init__(self, spec: BlockSpec, base_config, sliding_window: int | None = None):
        super().__init__()
        self.parallel = spec.parallel
        self.attention = SideAttention(spec, base_config, sliding_window)
        self.mlp = SideMLP(spec)

        def norm():
            return make_norm(spec.norm, spec.hidden_size, spec.norm_eps)

        self.attention_norm = norm()
        self.mlp_norm = norm() if spec.parallel != "one_norm" else None
        self.attention_post_norm = norm() if spec.post_norms else nn.Identity()
        self.mlp_post_norm = norm() if spec.post_norms else nn.Identity()

    def forward(
        self, hidden: torch.Tensor, context: BlockContext, cache=None, layer_idx: int = 0, recompute_mlp: bool = False
    ) -> torch.Tensor:
        """[batch, seq, d_s] -> [batch, seq, d_s]; with `recompute_mlp` the MLP half keeps only its input."""
        if fused_block.fuses(self, hidden):
            return self._fused(hidden, context, cache, layer_idx, recompute_mlp)
        normed = self.attention_norm(hidden)
        attended = self.attention_post_norm(self.attention(normed, context, cache, layer_idx))
        if self.parallel is None:
            hidden = hidden + attended
            return hidden + self._mlp_half(hidden, recompute_mlp)
        return hidden + attended + self._mlp_half(normed if self.mlp_norm is None else hidden, recompute_mlp)

    @property
    def fused_parts(self) -> list[nn.Module]:
        """The modules whose forward `_fused` does not call."""
        a, m = self.attention, self.mlp
        parts = (a, m, a.q_proj, a.k_proj, a.v_proj, a.o_proj, self.attention_norm, self.mlp_norm)
        return [part for part in (*parts, m.gate_proj, m.up_proj, m.down_proj) if part is not None]

    def _fused(self, hidden, context: BlockContext, cache, layer_idx: int, recompute_mlp: bool) -> torch.Tensor:
        """The same function in three autograd nodes and the attention."""
        a, spec = self.attention, self.attention.spec
        layers = [a.q_proj, a.k_proj, a.v_proj]
        tables = context.rotary(spec, hidden.device, fused_block.product_dtype(hidden))
        # A norm per head lies between projection and rotation.
        inside = None if spec.qk_norm else tables
        query, key, value = fused_block.heads(hidden, self.attention_norm, layers, spec.head_dim, inside)
        if spec.qk_norm:
            query, key = a.q_norm(query).to(value.dtype), a.k_norm(key).to(value.dtype)
            if tables is not None:
                query, key = fused_block.rotate(query, *tables), fused_block.rotate(key, *tables)
        attended = a.attend(query, key, value, context, cache, layer_idx)
        return fused_block.output_and_mlp(attended, hidden, a.o_proj, self.mlp_norm, self.mlp, recompute_mlp)

    def _mlp_half(self, hidden: torch.Tensor, recompute: bool) -> torch.Tensor:
        parts = [part for part in (self.mlp_norm, self.mlp, self.mlp_post_norm) if part is not None]
        if recompute:
            parameters = [p for part in parts for p in part.parameters()]
            return _Recomputed.apply(lambda x: self._mlp_half(x, False), hidden, *parameters)
        for part in parts:
            hidden = part(hidden)
        return hidden
