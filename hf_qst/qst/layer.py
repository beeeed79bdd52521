"""The PEFT layer of QST, which wraps the base's decoder stack."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from hf_qst.base_model.architecture import argument
from hf_qst.base_model.block_calls import by_name, hidden_of, with_first_argument
from hf_qst.base_model.decoder_stack import DecoderStack
from hf_qst.base_model.packed_weights import forbid_packing
from hf_qst.qst import continuous_batching
from hf_qst.qst.base_pass import BasePass, Reader, Rows
from hf_qst.qst.cache import with_side_layers
from hf_qst.qst.frozen_head import LOSS_REQUEST
from hf_qst.qst.hidden_states.replaceable_blocks import ReplaceableForward
from hf_qst.qst.in_turn import InTurn
from hf_qst.qst.side_block import BlockContext
from hf_qst.qst.side_network import SideNetwork
from hf_qst.qst.tail import CheckpointedForward, key, linear_layers
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


def _parameters_of(module: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(type(module).forward).parameters.values())[1:]


class _BlockHook:
    """Forward hook of base block `index`. A class, not a closure, so that models can be pickled and copied."""

    def __init__(self, index: int, block: nn.Module, tape: RunningForward, stack: DecoderStack):
        row = stack.architecture
        # Not the row itself, which does not pickle.
        self.index, self.state, self.width = index, row.state, stack.spec.hidden_size
        self.mask, self.mask_hides, self.positions = row.mask, row.mask_hides, row.positions
        self.tape = tape
        signature = _parameters_of(block)
        self.parameters = [p.name for p in signature if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        attention = dict(block.named_modules()).get(row.attention)
        signature += [] if attention is None else _parameters_of(attention)
        self.named = {p.name for p in signature if p.kind is not p.VAR_KEYWORD}

    def __call__(self, block, args, kwargs, output):
        running = self.tape.current
        if running is None or not running.reads(self.index):
            return
        arguments = {**by_name(self.parameters, args), **kwargs}
        states = arguments.pop(self.parameters[0]), hidden_of(output)
        entering, leaving = (self.state(state, self.width) for state in states)
        mask = argument(arguments, self.mask)
        context = BlockContext(
            attention_mask=~mask if self.mask_hides and mask is not None else mask,
            position_embeddings=argument(arguments, self.positions),
            attention_kwargs={k: v for k, v in arguments.items() if k in _FORWARDED or k not in self.named},
            hidden_dtype=entering.dtype,
            length=entering.shape[1],
        )
        running.record(self.index, entering, leaving, context)


class _TailStart:
    """Forward pre-hook of base block `index`: the tail's first block reads the mix, and with it the gradients start.

    `QSTLayer` runs the base without gradients and restores the caller's mode after it.
    """

    def __init__(self, index: int, tape: RunningForward):
        self.index, self.tape = index, tape

    def __call__(self, block, args, kwargs):
        running = self.tape.current
        if running is None or not running.starts_tail(self.index):
            return None
        torch.set_grad_enabled(running.grad)
        return with_first_argument(args, kwargs, partial(running.enter_tail, self.index))


class _TailUpdate:
    """Forward hook of a linear layer in a tail: adds its low-rank update."""

    def __init__(self, name: str, tape: RunningForward):
        self.name, self.tape = name, tape

    def __call__(self, linear, args, output):
        running = self.tape.current
        return None if running is None else running.updated(self.name, args[0], output)


class QSTLayer(StackLayer):
    """Wraps a decoder stack and mixes its output, or the state that enters its tail, with that of a side network.

    The stack runs in evaluation mode, and without gradients but for the blocks of a tail. It runs once for all side
    networks of a call: the active ones, whose mixes are averaged, or those that `adapter_names` asks for by row.
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
        self.requested = RunningForward()
        """In place of the active adapters: a function of the number of rows that returns names with their `Rows`."""
        self.in_turn = InTurn(self)
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
            self.hook_handles.append(CheckpointedForward(blocks[i], self.tape))
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
        output = self.in_turn.output(args, kwargs) if self.in_turn.runs else self._output(args, kwargs)
        if request is not None:
            request.hidden = output[0]
        return output

    def _output(self, args: tuple, kwargs: dict):
        named = self.base_arguments(args, kwargs)
        networks = self._networks(named)
        if not networks:
            return self.base_layer(*args, **kwargs)
        running, output = self.run_base(networks, named)
        return with_last_hidden_state(output, running.leave(output[0]))

    def _networks(self, kwargs: dict) -> list[tuple[str, Rows | None]]:
        """The names of the side networks of this call, each with its rows (None for all)."""
        if not (active := self.active_networks()):
            return []
        if self.requested.current is None:
            networks = [(name, None) for name in active]
        else:
            inputs = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
            networks = self.requested.current(len(inputs))
        sharing = [name for name, rows in networks if rows is None]
        if len(sharing) > 1:
            self.refuse_tails(sharing, "these blocks would compute something else for each adapter")
        return networks

    def refuse_tails(self, names: Sequence[str], reason: str) -> None:
        """Check that these networks can read one pass of the base over the same rows.

        Raises:
            ValueError: one has a tail; the message ends with the reason why that hinders it.
        """
        for name in names:
            if (tail := self.networks[name].tail) is not None:
                raise ValueError(
                    f"the QST adapter {name!r} has a tail (tail_layers > 0), which changes the base's blocks from number "
                    f"{tail.first} on, so {', '.join(map(repr, names))} cannot share one pass of the base: {reason}. Use it "
                    f"alone (set_adapter({name!r})), or for rows of its own in a batch (adapter_names)"
                )

    def run_base(self, networks: list[tuple[str, Rows | None]], kwargs: dict) -> tuple[BasePass, object]:
        """Run the stack once, with its arguments by name, for these networks; returns the pass and the stack's output."""
        if not isinstance(kwargs.get("cache"), Cache | None):
            # The paged cache of continuous batching, which transformers passes through to each attention.
            raise NotImplementedError(continuous_batching.MESSAGE)
        kwargs.pop("logits_to_keep", None)  # Gemma 4 leaves the other tokens out of its last blocks
        cache = kwargs.get(self.cache_argument)
        chosen = [(name, rows, self.checked(name)) for name, rows in networks]
        if any(hasattr(parameter, "ds_id") for *_, network in chosen for parameter in network.parameters()):
            raise NotImplementedError(
                "QST does not train under ZeRO-3, which releases a layer's weights after the layer's own forward pass, and "
                "a side network reads some of them elsewhere. Divide the base with FSDP2, or use ZeRO-2"
            )
        if kwargs["use_cache"] or cache is not None:
            owners = [(name, rows and rows.indices, network.sources) for name, rows, network in chosen]
            cache = kwargs[self.cache_argument] = with_side_layers(
                cache, self.base_layer.config, self.num_layers, owners
            )
        stored = self._stored_states(chosen, kwargs)
        readers, first, grad = [], self.num_layers, torch.is_grad_enabled()
        for name, rows, network in chosen:
            readers.append(Reader(name, network, rows, grad, cache, first, stored.get(name)))
            first += len(network.sources)
        running = BasePass(readers, grad)
        with self.tape.using(running), torch.no_grad():
            output = self.base_layer(**kwargs)
        return running, output

    def _stored_states(self, chosen: list[tuple[str, Rows | None, SideNetwork]], kwargs: dict) -> dict:
        """By name, the states of this batch that stand in for the base's, if each of these networks has a cache of them."""
        for _, rows, network in chosen:
            cache = network.hidden_states
            if rows is not None or cache is None or not cache.serves(self.base_layer, kwargs):
                return {}
        return {name: network.hidden_states.stored(self, network, kwargs) for name, _, network in chosen}

    def network_of_loss(self) -> SideNetwork | None:
        """The network whose settings the training loss follows; None where the model's own loss is used."""
        active = self.active_networks()
        if not active or self.requested.current is not None:
            return None
        if self.in_turn.runs:
            return active[self.in_turn.turn]
        # One that wants full logits decides for all that are averaged.
        return min(active.values(), key=lambda network: network.chunked_loss)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        before = self.active_adapters
        super().set_adapter(adapter_names, inference_mode)
        if before != self.active_adapters:
            self.in_turn.stop(self.active_adapters)

    def train(self, mode: bool = True):
        super().train(mode)
        if mode:
            for module in self.qst_net.modules():
                if hasattr(module, "restore"):
                    module.restore()
        return self

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise SideNetworkMergeError()
