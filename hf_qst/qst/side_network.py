"""The side network: downsamplers, gates, side blocks, upsampler and the mix with the base's output.

    g_0 = D_1(h_0)
    u_i = (1 - beta_i) D_i(h_i) + beta_i g_{i-1},   beta_i = sigmoid(gamma_i)
    g_i = B_i(u_i)                                                            i = 1 .. L
    h_out = mix(N_f(h_L), U(N_g(g_L)))

h_0 is the input of the base's first block, h_i the output of its block i, and N_f its final norm (paper, section 3 and
figure 2). h_0 and h_1 share the first downsampler.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_qst.base_model.decoder_stack import DecoderStack
from hf_qst.qst.downsample import make_downsample
from hf_qst.qst.side_block import BlockContext, SideBlock, make_norm, side_spec
from hf_qst_kernels import decisions, dispatch


class Float32Parameter(nn.Module):
    """A small learned tensor that stays float32 when the model is cast.

    In 16 bits a gate at 0.5 or 1 would not move, because a step of 2e-4 rounds to nothing. `module.bfloat16()` and the
    like call `_apply`. `restore`, called on entering training mode, undoes casts of `param.data`. With `is_pinned=False`
    the tensor is cast like any other.
    """

    is_pinned = True

    def __init__(self, size: int, value: float):
        super().__init__()
        self.value = nn.Parameter(torch.full((size,), float(value)))

    def _apply(self, fn, recurse=True):
        if not self.is_pinned:
            return super()._apply(fn, recurse)
        exact = self.value.detach()
        super()._apply(fn, recurse)
        if self.value.dtype != torch.float32:
            # From the exact values, not from the rounded ones.
            self.value.data = exact.to(self.value.device, torch.float32)
        self.restore()
        return self

    def restore(self) -> None:
        if not self.is_pinned:
            return
        if self.value.dtype != torch.float32:
            self.value.data = self.value.data.float()
        if self.value.grad is not None and self.value.grad.dtype != torch.float32:
            self.value.grad = self.value.grad.float()


class _Mix(torch.autograd.Function):
    """`alpha * base + weight * side`, computed in float32 and returned in base's dtype; keeps no float32 copies.

    `weight` is 1, or with `convex` 1 - alpha. `base` has no gradient.
    """

    @staticmethod
    def forward(ctx, base, side, alpha, convex: bool):
        ctx.convex = convex
        ctx.save_for_backward(base, alpha, side if convex else None)
        ctx.side_dtype = side.dtype
        weighted = side.float() * (1 - alpha) if convex else side.float()
        return (base.float() * alpha + weighted).to(base.dtype)

    @staticmethod
    def backward(ctx, grad):
        base, alpha, side = ctx.saved_tensors
        grad = grad.float()
        grad_side = grad_alpha = None
        if ctx.needs_input_grad[1]:
            grad_side = (grad * (1 - alpha) if ctx.convex else grad).to(ctx.side_dtype)
        if ctx.needs_input_grad[2]:
            difference = base.float() - side.float() if ctx.convex else base.float()
            products = (grad * difference).flatten(0, -2)
            grad_alpha = products.sum(0) if alpha.numel() > 1 else products.sum().reshape(1)
        return None, grad_side, grad_alpha, None


class OutputMix(nn.Module):
    """Mixes the base's normalised output with the side network's, both [batch, seq, d_out].

    Args:
        kind: "residual", "paper" or "sigmoid", see `QSTConfig.mix`.
        size: 1 or d_out.
        lr_scale: alpha is start + lr_scale * parameter, so with Adam this multiplies alpha's learning rate.
    """

    def __init__(self, kind: str, size: int, lr_scale: float):
        super().__init__()
        self.kind = kind
        self.lr_scale = lr_scale
        # The parameter is the difference from the start, 1.
        self.alpha = Float32Parameter(size, 0.0)

    def forward(self, base: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
        alpha = 1.0 + self.lr_scale * self.alpha.value.float()
        if self.kind == "sigmoid":
            alpha = torch.sigmoid(alpha)
        return _Mix.apply(base, side, alpha.to(base.device), self.kind != "residual")


class SideNetwork(nn.Module):
    """One adapter's side network.

    Args:
        config ([`QSTConfig`])
        stack: the base's decoder stack; only its shapes and devices are used.
    """

    def __init__(self, config, stack: DecoderStack):
        super().__init__()
        base, spec = stack.spec, side_spec(stack.spec, config.r, config.side_heads)
        self.checkpointing = config.side_checkpointing
        self.chunked_loss = config.chunked_loss
        gate_size = 1 if config.gate_shape == "scalar" else spec.hidden_size
        mix_size = 1 if config.mix_shape == "scalar" else stack.output_size

        self.downsample = nn.ModuleList()
        self.gates = nn.ModuleList()
        self.blocks = nn.ModuleList()
        for block in stack.blocks:
            attention = getattr(block, stack.architecture.attention)
            window = getattr(attention, "sliding_window", None)
            self.downsample.append(make_downsample(config, base.hidden_size, spec.hidden_size))
            self.gates.append(Float32Parameter(gate_size, config.gate_init))
            self.blocks.append(SideBlock(spec, stack.module.config, window))
        self.norm = make_norm(spec.norm, spec.hidden_size, spec.norm_eps)
        self.upsample = nn.Linear(spec.hidden_size, stack.output_size, bias=True)
        self.mix = OutputMix(config.mix, mix_size, config.mix_lr_scale)
        if not config.init_weights:
            nn.init.normal_(self.mix.alpha.value, std=0.1)  # mix="paper" starts where the side network has no weight
        elif config.mix == "residual":
            # The side network's output starts at zero, as that of LoRA's second factor: the first step changes only this
            # layer, later steps all layers.
            nn.init.zeros_(self.upsample.weight)
            nn.init.zeros_(self.upsample.bias)
        self.place(stack)

    def place(self, stack: DecoderStack) -> None:
        """Move the parts for base block i to that block's device, and the other parts to the last block's."""
        for i, block in enumerate(stack.blocks):
            device = next(block.parameters()).device
            for part in (self.downsample[i], self.gates[i], self.blocks[i]):
                _move(part, device)
        for part in (self.norm, self.upsample, self.mix):
            _move(part, device)

    def cast(self, dtype: torch.dtype) -> None:
        """Cast all parameters, also those that otherwise stay float32."""
        for module in self.modules():
            if isinstance(module, Float32Parameter):
                module.is_pinned = False
        self.to(dtype)

    def tap(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """The tap of downsampler `index` on a base state [batch, seq, d]."""
        # With a device map, the first state may still be on the previous device.
        return self.downsample[index].tap(hidden.to(self.gates[index].value.device))

    def forward(
        self, embedding: torch.Tensor, taps: list[torch.Tensor], contexts: list[BlockContext], cache=None
    ) -> torch.Tensor:
        """Run the side network over the taps of one base forward.

        Args:
            embedding: tap of the input of the base's first block.
            taps: taps of the outputs of the L blocks.
            contexts: the other arguments of each block.
            cache: the base's cache; its layers L .. 2L - 1 are this network's.

        Returns:
            U(N_g(g_L)), [batch, seq, d_out].
        """
        count = len(taps)
        recompute = self.checkpointing if cache is None and torch.is_grad_enabled() else False
        side = self.downsample[0].finish(embedding)
        tables = {}
        for context in contexts:
            context.side_tables = tables
        for i, (tapped, context) in enumerate(zip(taps, contexts, strict=True)):
            # Decided here, because a recomputed step must save the same tensors as the first time.
            fused = self._fuses(i, side)
            if recompute is True:
                random = self._has_dropout(i)
                side = checkpoint(
                    self._step, i, tapped, side, context, fused, use_reentrant=False, preserve_rng_state=random
                )
            else:
                side = self._step(i, tapped, side, context, fused, cache, count + i, recompute == "mlp")
        return self.upsample(self.norm(side).to(self.upsample.weight.dtype))

    def _step(
        self,
        i: int,
        tapped: torch.Tensor,
        side: torch.Tensor,
        context: BlockContext,
        fused: bool,
        cache=None,
        layer_idx: int = 0,
        recompute_mlp: bool = False,
    ) -> torch.Tensor:
        gate, dtype = self.gates[i].value.float(), self.blocks[i].attention.q_proj.weight.dtype
        mixed = self.downsample[i].mix(tapped, side.to(gate.device), gate, dtype, fused)
        return self.blocks[i](mixed, context, cache, layer_idx, recompute_mlp)

    def _fuses(self, i: int, side: torch.Tensor) -> bool:
        """Whether step `i` begins with one fused kernel: no dropout is active and the kernel was measured to be faster."""
        dropout = self.downsample[i].dropout
        if dropout.training and dropout.p > 0:
            return False
        return dispatch.runs_triton("norm_gate", side, decisions.norm_gate_sizes(side))

    def _has_dropout(self, i: int) -> bool:
        rate = max(self.downsample[i].dropout.p, self.blocks[i].attention.spec.attention_dropout)
        return self.training and rate > 0


def _move(part: nn.Module, device: torch.device) -> None:
    if device.type != "meta" and not any(p.is_meta for p in part.parameters()):
        part.to(device)
