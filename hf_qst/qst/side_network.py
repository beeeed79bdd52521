"""The side network: downsamplers, gates, side blocks, upsampler and the mix with the base's output.

    g_0 = D_1(h_0)
    u_i = (1 - beta_i) D_i(h_i) + beta_i g_{i-1},   beta_i = sigmoid(gamma_i)
    g_i = B_i(u_i)                                                            i in S
    h_out = mix(N_f(h_L), U(N_g(g_L)) + R concat_i(A_i rms(h_i)))             i in T

With a tail of k blocks (`hf_qst.qst.tail`), S and T are among the L - k blocks below it, and the mix is of h_{L-k}, the state
that enters it, in place of N_f(h_L).
h_0 is the input of the base's first block, h_i the output of its block i, and N_f its final norm (paper, section 3 and
figure 2). h_0 shares the first downsampler. In the paper S is every block and T is empty. By default S is every fifth
block, with wider side blocks in turn. The readout (A, R) adds a low-rank function of every third state to the output: it
learns in the first steps, when the side network is still a random one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_qst.base_model.decoder_stack import DecoderStack
from hf_qst.qst.downsample import make_downsample, rms
from hf_qst.qst.side_block import BlockContext, SideBlock, make_norm, side_spec
from hf_qst.qst.tail import Tail
from hf_qst_kernels import decisions, dispatch, tap_linear


def every(step: int, count: int) -> list[int]:
    """Every `step`-th of `count` blocks, the last one among them."""
    return list(range(count - 1, -1, -step))[::-1]


class Readout(nn.Module):
    """R concat_i(A_i rms(h_i)): what the output takes from the base's states, by two factors. Starts at zero.

    Args:
        places: the blocks whose outputs are read.
        hidden_size, output_size, rank: A_i is [rank, hidden_size], R [output_size, rank * len(places)].
        storage: what is kept of a state for the gradient of A_i, see `hf_qst_kernels.tap_linear`.
    """

    def __init__(self, places: list[int], hidden_size: int, output_size: int, rank: int, storage: str, zero: bool):
        super().__init__()
        self.storage = storage
        self.down = nn.ModuleDict({str(i): nn.Linear(hidden_size, rank, bias=False) for i in places})
        self.up = nn.Linear(rank * len(places), output_size, bias=False)
        if zero:
            nn.init.zeros_(self.up.weight)

    def weight(self, index: int) -> torch.Tensor | None:
        """A_i [rank, hidden_size] of block `index`, None if its output is not read."""
        return self.down[str(index)].weight if str(index) in self.down else None

    def forward(self, taps: list[torch.Tensor]) -> torch.Tensor:
        """A_i rms(h_i) [batch, seq, rank] in the order of the blocks -> [batch, seq, output_size]."""
        up = self.up.weight
        return self.up(torch.cat([tap.to(up.device, up.dtype) for tap in taps], dim=-1))


@dataclass
class Taps:
    """What a side network keeps of one base forward.

    `embedding` and `side` are for the downsamplers, of the state entering the first block and of the outputs of the
    blocks with a side block; `readout` is for the readout; `contexts` are, by base block, what the base gave it.
    """

    embedding: torch.Tensor | None = None
    side: list[torch.Tensor] = field(default_factory=list)
    contexts: dict[int, BlockContext] = field(default_factory=dict)
    readout: list[torch.Tensor] = field(default_factory=list)


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
        output_size = base.hidden_size if config.tail_layers else stack.output_size
        mix_size = 1 if config.mix_shape == "scalar" else output_size

        read = len(stack.blocks) - config.tail_layers
        self.places = every(config.side_every, read)
        self.downsample = nn.ModuleList()
        self.gates = nn.ModuleList()
        self.blocks = nn.ModuleList()
        sources = stack.attention_sources()
        # The base block whose mask and positions each side block uses: its own, if that attends.
        self.sources = [sources[i] for i in self.places]
        for source in self.sources:
            attention = dict(stack.blocks[source].named_modules()).get(stack.architecture.attention)
            window = getattr(attention, "sliding_window", None)
            self.downsample.append(make_downsample(config, base.hidden_size, spec.hidden_size))
            self.gates.append(Float32Parameter(gate_size, config.gate_init))
            self.blocks.append(SideBlock(spec, stack.module.config, window))
        self.readout = None
        if config.readout_rank:
            sizes = base.hidden_size, output_size, config.readout_rank
            places = every(config.readout_every, read)
            self.readout = Readout(places, *sizes, config.tap_storage, zero=config.init_weights)
        # The input of the first block is read too.
        readout = [] if self.readout is None else map(int, self.readout.down)
        self.read_blocks = {0, *self.places, *self.sources, *readout}
        self.hidden_states = None  # the cache of the base's states, if there is one
        self.tail = None
        if config.tail_layers:
            self.tail = Tail(stack.blocks, read, config.tail_rank, zero=config.init_weights)
        self.norm = make_norm(spec.norm, spec.hidden_size, spec.norm_eps)
        self.upsample = nn.Linear(spec.hidden_size, output_size, bias=True)
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
        """Put the parts for base block i on that block's device, the rest with the last block that is read."""
        devices = [next(block.parameters()).device for block in stack.blocks]
        for j, i in enumerate(self.places):
            for part in (self.downsample[j], self.gates[j], self.blocks[j]):
                _move(part, devices[i])
        last = devices[self.places[-1]]
        for part in (self.norm, self.upsample, self.mix):
            _move(part, last)
        if self.readout is not None:
            for i, down in self.readout.down.items():
                _move(down, devices[int(i)])
            _move(self.readout.up, last)
        if self.tail is not None:
            for name, update in self.tail.updates.items():
                _move(update, devices[int(name.partition("_")[0])])

    def cast(self, dtype: torch.dtype) -> None:
        """Cast all parameters, also those that otherwise stay float32."""
        for module in self.modules():
            if isinstance(module, Float32Parameter):
                module.is_pinned = False
        self.to(dtype)

    def record(
        self,
        taps: Taps,
        index: int,
        entering: torch.Tensor,
        leaving: torch.Tensor,
        context: BlockContext,
        tapped: torch.Tensor | None = None,
    ) -> None:
        """Add to `taps` what is read of base block `index`, of its input and output [batch, seq, d].

        `tapped` is the downsampler's reading of the output, if it is known; the output is then not read.
        """
        if index == 0:
            # Under a device map the first state may still be on the device before the block's.
            taps.embedding = self.downsample[0].tap(entering.to(self.gates[0].value.device))
        reads = None if self.readout is None else self.readout.weight(index)
        if index in self.sources:
            taps.contexts[index] = context
        if index in self.places:
            downsample = self.downsample[self.places.index(index)]
            if reads is None:
                taps.side.append(downsample.tap(leaving) if tapped is None else tapped)
            else:
                side, read = downsample.tap_with(leaving, reads, self.readout.storage)
                taps.side.append(side)
                taps.readout.append(read)
        elif reads is not None:
            taps.readout.append(tap_linear(rms(leaving), reads, storage=self.readout.storage))

    def forward(self, taps: Taps, cache=None, first_layer: int = 0) -> torch.Tensor:
        """Run the side network over the taps of one base forward.

        Args:
            taps ([`Taps`]): of a forward through all blocks of the base.
            cache: the base's cache; this network's layers are numbers `first_layer` and up of it.

        Returns:
            U(N_g(g_L)) and the readout, [batch, seq, d_out].
        """
        recompute = self.checkpointing if cache is None and torch.is_grad_enabled() else False
        side = self.downsample[0].finish(taps.embedding)
        tables = {}
        contexts = [taps.contexts[source] for source in self.sources]
        for context in contexts:
            context.side_tables = tables
        for i, (tapped, context) in enumerate(zip(taps.side, contexts, strict=True)):
            # Decided here, because a recomputed step must save the same tensors as the first time.
            fused = self._fuses(i, side)
            if recompute is True:
                random = self._has_dropout(i)
                side = checkpoint(
                    self._step, i, tapped, side, context, fused, use_reentrant=False, preserve_rng_state=random
                )
            else:
                side = self._step(i, tapped, side, context, fused, cache, first_layer + i, recompute == "mlp")
        output = self.upsample(self.norm(side).to(self.upsample.weight.dtype))
        return output if self.readout is None else output + self.readout(taps.readout)

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
