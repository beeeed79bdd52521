"""The PEFT layer of QST, which wraps the base's decoder stack."""

from __future__ import annotations

import inspect

import torch
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from hf_qst.base_model.architecture import argument
from hf_qst.base_model.block_calls import hidden_of, with_first_argument
from hf_qst.base_model.decoder_stack import DecoderStack
from hf_qst.base_model.packed_weights import forbid_packing
from hf_qst.qst import continuous_batching
from hf_qst.qst.cache import with_side_layers
from hf_qst.qst.frozen_head import LOSS_REQUEST
from hf_qst.qst.hidden_states.replaceable_blocks import ReplaceableForward
from hf_qst.qst.side_block import BlockContext
from hf_qst.qst.side_network import SideNetwork, Taps
from hf_qst.qst.tail import key, linear_layers
from hf_qst.tuner.running_forward import RunningForward
from hf_qst.tuner.stack_tuner import StackLayer, with_last_hidden_state

# Arguments that a base block names and its side block's attention gets too: of packed sequences. The others that it or its
# attention names are the base's own, such as biases for its heads; those that they only pass on are for any attention.
_FORWARDED = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "kernel_options")


class SideNetworkMergeError(NotImplementedError):
    """A side network cannot be merged into the base's weights."""

    def __init__(self):
        super().__init__(
            "a QST side network reads the base's hidden states through layers of its own and cannot be merged into its "
            "weights. Keep it as an adapter (save_pretrained), or take the base back with unload()."
        )


class _GivenHidden(BaseModelOutputWithPastAndCrossAttentions):
    """The output of a stack that did not run."""

    router_logits = None  # of a mixture of experts
    shared_kv_states = None  # of Gemma 4


class _Recorder:
    """One forward pass of the base: its taps, and what the side network makes of them."""

    def __init__(self, network: SideNetwork, grad: bool, cache, num_layers: int):
        self.network, self.grad, self.tail = network, grad, network.tail
        self.cache, self.num_layers = cache, num_layers
        self.taps = Taps()
        self.stored = None  # states that stand in for those of the base's frozen blocks, which then do not run

    def mixed(self, frozen: torch.Tensor) -> torch.Tensor:
        """The last state of the base's frozen part [batch, seq, d] mixed with the side network's output."""
        side = self.network(self.taps, self.cache, self.num_layers)
        return self.network.mix(frozen.detach(), side.to(frozen.device))

    def reads(self, index: int) -> bool:
        """Whether anything of base block `index` is kept."""
        return index in self.network.read_blocks

    def replaced(self, index: int, entering: torch.Tensor) -> torch.Tensor | None:
        """The output of base block `index`, which need not run then; None if it must."""
        return None if self.stored is None else self.stored.leaving(index, entering)

    def record(self, index: int, entering: torch.Tensor, leaving: torch.Tensor, context: BlockContext) -> None:
        tapped = None if self.stored is None else self.stored.tapped(index, leaving.device)
        if not self.grad:
            return self.network.record(self.taps, index, entering, leaving, context, tapped)
        # The base runs without gradients, but a trainable downsampler needs them for its weight.
        with torch.enable_grad():
            self.network.record(self.taps, index, entering.detach(), leaving.detach(), context, tapped)


def _parameters_of(module: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(type(module).forward).parameters.values())[1:]


class _BlockHook:
    """Forward hook of base block `index`. A class, not a closure, so that models can be pickled and copied."""

    def __init__(self, index: int, block: nn.Module, tape: RunningForward, stack: DecoderStack):
        self.index, self.row, self.width = index, stack.architecture, stack.spec.hidden_size
        self.tape = tape
        signature = _parameters_of(block)
        self.parameters = [p.name for p in signature if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        attention = dict(block.named_modules()).get(self.row.attention)
        signature += [] if attention is None else _parameters_of(attention)
        self.named = {p.name for p in signature if p.kind is not p.VAR_KEYWORD}

    def __call__(self, block, args, kwargs, output):
        recorder = self.tape.current
        if recorder is None or not recorder.reads(self.index):
            return
        arguments = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        states = arguments.pop(self.parameters[0]), hidden_of(output)
        entering, leaving = (self.row.state(state, self.width) for state in states)
        mask = argument(arguments, self.row.mask)
        context = BlockContext(
            attention_mask=~mask if self.row.mask_hides and mask is not None else mask,
            position_embeddings=argument(arguments, self.row.positions),
            attention_kwargs={k: v for k, v in arguments.items() if k in _FORWARDED or k not in self.named},
            hidden_dtype=entering.dtype,
            length=entering.shape[1],
        )
        recorder.record(self.index, entering, leaving, context)


class _TailStart:
    """Forward pre-hook of base block `index`: the tail's first block reads the mix, and with it the gradients start.

    `QSTLayer` runs the base without gradients and restores the caller's mode after it.
    """

    def __init__(self, index: int, tape: RunningForward):
        self.index, self.tape = index, tape

    def __call__(self, block, args, kwargs):
        recorder = self.tape.current
        if recorder is None or recorder.tail is None or recorder.tail.first != self.index:
            return None
        torch.set_grad_enabled(recorder.grad)
        return with_first_argument(args, kwargs, recorder.mixed)


class _TailUpdate:
    """Forward hook of a linear layer in a tail: adds its low-rank update."""

    def __init__(self, name: str, tape: RunningForward):
        self.name, self.tape = name, tape

    def __call__(self, linear, args, output):
        recorder = self.tape.current
        if recorder is None or recorder.tail is None:
            return None
        update = recorder.tail.update(self.name, args[0])
        return None if update is None else output + update.to(output.device, output.dtype)


class QSTLayer(StackLayer):
    """Wraps a decoder stack and mixes its output, or the state that enters its tail, with that of a side network.

    The stack runs in evaluation mode, and without gradients but for the blocks of a tail.
    """

    adapter_layer_names = ("qst_net",)
    method = "QST"
    alone = "QST runs its base without gradients, so other adapters in it could not be trained."

    def __init__(self, base_layer: nn.Module, stack: DecoderStack):
        super().__init__(base_layer)
        self.block_path = stack.architecture.blocks
        self.hooked_from = len(stack.blocks)  # the first block with the hooks of a tail
        self.replaceable = False  # whether blocks can return stored states in place of running
        # Of a cache for the base alone; a block may have two of them.
        self.num_layers = max(len(stack.blocks), len(DynamicCache(config=stack.module.config).layers))
        self.tape = RunningForward()
        self.hook_handles = [
            block.register_forward_hook(_BlockHook(i, block, self.tape, stack), with_kwargs=True)
            for i, block in enumerate(stack.blocks)
        ]

    def update_layer(self, adapter_name: str, network: SideNetwork, inference_mode: bool) -> None:
        super().update_layer(adapter_name, network, inference_mode)
        if network.tail is not None:
            self._hook_tail(network.tail.first)

    @property
    def blocks(self) -> nn.ModuleList:
        """Those of the base."""
        return self.base_layer.get_submodule(self.block_path)

    def make_blocks_replaceable(self) -> None:
        """Let the recorder of a forward give the output of a block, which then does not run."""
        if not self.replaceable:
            self.hook_handles += [ReplaceableForward(i, block, self.tape) for i, block in enumerate(self.blocks)]
            self.replaceable = True

    def _hook_tail(self, first: int) -> None:
        blocks = self.blocks
        for i in range(first, self.hooked_from):
            start = _TailStart(i, self.tape)
            self.hook_handles.append(blocks[i].register_forward_pre_hook(start, with_kwargs=True))
            for path, linear in linear_layers(blocks[i]):
                self.hook_handles.append(linear.register_forward_hook(_TailUpdate(key(i, path), self.tape)))
            # bitsandbytes' packed layout on a CPU has no backward pass.
            self.hook_handles.append(forbid_packing(blocks[i]))
        self.hooked_from = min(first, self.hooked_from)

    def forward(self, *args, **kwargs):
        request = kwargs.pop(LOSS_REQUEST, None)
        if request is not None:
            request.arrived = True
        if request is not None and request.hidden is not None:
            return _GivenHidden(last_hidden_state=request.hidden)
        network = self.active_network()
        if network is None:
            output = self.base_layer(*args, **kwargs)
        else:
            output = self._side_tuned(network, self.base_arguments(args, kwargs))
        if request is not None:
            request.hidden = output[0]
        return output

    def _side_tuned(self, network: SideNetwork, kwargs: dict):
        if kwargs.get("cache") is not None:
            # The paged cache of continuous batching, which transformers passes through to each attention.
            raise NotImplementedError(continuous_batching.MESSAGE)
        config = self.base_layer.config
        kwargs.pop("logits_to_keep", None)  # Gemma 4 leaves the other tokens out of its last blocks
        cache = kwargs.get("past_key_values")
        if kwargs["use_cache"] or cache is not None:
            cache = kwargs["past_key_values"] = with_side_layers(cache, config, self.num_layers, network.sources)

        recorder = _Recorder(network, torch.is_grad_enabled(), cache, self.num_layers)
        if network.hidden_states is not None and network.hidden_states.serves(self.base_layer, kwargs):
            recorder.stored = network.hidden_states.stored(self, network, kwargs)
        with self.tape.using(recorder), torch.no_grad():
            output = self.base_layer(**kwargs)

        return output if recorder.tail is not None else with_last_hidden_state(output, recorder.mixed(output[0]))

    def train(self, mode: bool = True):
        super().train(mode)
        if mode:
            for module in self.qst_net.modules():
                if hasattr(module, "restore"):
                    module.restore()
        return self

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise SideNetworkMergeError()
