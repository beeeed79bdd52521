"""The side network: downsamplers, gates, side blocks, upsampler and the mix with the base's output.

    g_0 = D_1(h_0)
    u_i = (1 - beta_i) D_i(h_i) + beta_i g_{i-1},   beta_i = sigmoid(gamma_i)
    g_i = B_i(u_i)                                                            i = 1 .. L
    h_out = mix(N_f(h_L), U(N_g(g_L)))

with h_0 the state entering the base's first block, h_i the raw output of its block i and N_f its final norm (paper,
section 3 and figure 2). The embedding shares the first downsampler.
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
    """A small learned tensor that stays float32 whatever the model is cast to.

    A gate at 0.5 or 1 does not move in 16 bits: a step of 2e-4 rounds back to where it was. `module.bfloat16()` and the
    like go through `_apply`; code that casts `param.data` itself is undone by `restore`, which training mode calls.
    With `is_pinned=False` it is cast like any other, for who asks for that.
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
            # Not through the 16 bits it was cast to.
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
    """alpha * base + weight * side in float32, in base's dtype; keeps base (and side, if needed) but no float32 copy.

    `side_weight` is 1 for the residual mix and 1 - alpha for the paper's. Base has no gradient.
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
    """Joins the base's normalised output with the side network's, [batch, seq, d_out] both.

    Args:
        kind: "residual", "paper" or "sigmoid", see `QSTConfig.mix`.
        size: 1 or d_out.
        lr_scale: alpha is start + lr_scale * parameter, which under Adam multiplies its learning rate.
    """

    def __init__(self, kind: str, size: int, lr_scale: float):
        super().__init__()
        self.kind = kind
        self.lr_scale = lr_scale
        # Stored as the distance from its start, 1.
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
        stack: the base's decoder stack, for its shapes and devices; no reference to it is kept.
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
            # The side network starts silent, as a LoRA's second factor does: the first step moves this layer, and
            # through it every other from the second step on.
            nn.init.zeros_(self.upsample.weight)
            nn.init.zeros_(self.upsample.bias)
        self.place(stack)

    def place(self, stack: DecoderStack) -> None:
        """Put the parts for base block i on that block's device, the rest with the last block."""
        for i, block in enumerate(stack.blocks):
            device = next(block.parameters()).device
            for part in (self.downsample[i], self.gates[i], self.blocks[i]):
                _move(part, device)
        for part in (self.norm, self.upsample, self.mix):
            _move(part, device)

    def cast(self, dtype: torch.dtype) -> None:
        """All parameters in this dtype, also those that otherwise stay float32."""
        for module in self.modules():
            if isinstance(module, Float32Parameter):
                module.is_pinned = False
        self.to(dtype)

    def tap(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """What downsampler `index` keeps of a base state [batch, seq, d]."""
        # Under a device map the first state may still be on the device before the block's.
        return self.downsample[index].tap(hidden.to(self.gates[index].value.device))

    def forward(
        self, embedding: torch.Tensor, taps: list[torch.Tensor], contexts: list[BlockContext], cache=None
    ) -> torch.Tensor:
        """Run the side network over the taps of one base forward.

        Args:
            embedding: tap of the state entering the base's first block.
            taps: of the outputs of the L blocks.
            contexts: what the base gave each block.
            cache: the base's cache; this network's layers are numbers L .. 2L - 1 of it.

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
            # Asked here and not in the step: a recomputed step must keep the tensors that it kept the first time.
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
        """Whether step `i` begins with one kernel: where that was measured to win and no dropout lies in between."""
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
