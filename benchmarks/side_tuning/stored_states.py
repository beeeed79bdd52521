"""Training on the stored hidden states of a frozen base.

The base is the same for every side network and never changes, so its states are computed once for each batch; a training
step is then the side network, the blocks of a tail, the head and the optimiser.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from peft import get_peft_model
from torch import nn

from benchmarks.side_tuning.tasks import Batch
from hf_qst import QSTConfig
from hf_qst.qst import Taps
from hf_qst_kernels import linear_cross_entropy


@dataclass
class Step:
    """Of one batch: the state entering each block and that leaving the last one [rows, seq, d] in float16, what the base
    gave each block, and the normalised output of the stack in float32."""

    batch: Batch
    states: list[torch.Tensor]
    contexts: list
    output: torch.Tensor


class _Recording:
    """Takes the place of a pass that side networks read: keeps the states."""

    def __init__(self):
        self.states, self.contexts = [], []

    def reads(self, index) -> bool:
        return True

    def starts_tail(self, index) -> bool:
        return False

    def updated(self, name, x, output):
        return output

    def record(self, index, entering, leaving, context) -> None:
        if index == 0:
            self.states.append(entering.half())
        self.states.append(leaving.half())
        self.contexts.append(context)


class _TailAlone:
    """The pass while only the blocks of a tail run: they read a state that is mixed already."""

    def __init__(self, tail):
        self.tail = tail

    def reads(self, index) -> bool:
        return False

    def starts_tail(self, index) -> bool:
        return False

    def updated(self, name, x, output):
        return output + self.tail.update(name, x)


class StoredBase:
    """A base with its head, and the states that it gives for batches."""

    def __init__(self, base: nn.Module):
        # Its hooks around the blocks are wanted, and a side network away from its start, for the check.
        self.model = get_peft_model(copy.deepcopy(base), QSTConfig(task_type="CAUSAL_LM", init_weights=False)).eval()
        self.layer = self.model.base_model.model.model
        self.head = self.model.get_output_embeddings().weight.detach()
        self.contexts: dict[tuple, list] = {}

    @torch.no_grad()
    def step(self, batch: Batch) -> Step:
        recording = _Recording()
        with self.layer.tape.using(recording):
            output = self.layer.base_layer(input_ids=batch.ids, use_cache=False)
        # Masks and rotary tables of equal shapes are equal: one copy is kept.
        contexts = self.contexts.setdefault(tuple(batch.ids.shape), recording.contexts)
        return Step(batch, recording.states, contexts, output[0])

    @torch.no_grad()
    def check(self, step: Step) -> None:
        """Compare the loss on stored states with that of the model itself.

        Raises:
            RuntimeError: they differ by more than the states' rounding to float16 explains.
        """
        batch = step.batch
        stored = self.loss(hidden(self.layer, step), batch).item()
        whole = self.model(input_ids=batch.ids, labels=batch.labels).loss.item()
        print(f"loss of a random side network on stored states {stored:.5f}, in the model {whole:.5f}")
        if abs(stored - whole) > 1e-3 * abs(whole):
            raise RuntimeError(f"the loss on stored states is {stored}, in the model {whole}")

    def loss(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Mean loss in nats a label for the output of a stack [rows, seq, d]."""
        labels = batch.labels[:, 1:].reshape(-1)
        return linear_cross_entropy(hidden[:, :-1].reshape(len(labels), -1), self.head, labels)


def hidden(layer, step: Step) -> torch.Tensor:
    """The output of a side-tuned stack [rows, seq, d], computed from the stored states of its base."""
    network, taps = layer.active_network(), Taps()
    read = len(step.contexts) if network.tail is None else network.tail.first
    for i in range(read):
        network.record(taps, i, step.states[i].float(), step.states[i + 1].float(), step.contexts[i])
    if network.tail is None:
        return network.mix(step.output, network(taps))
    state, stack = network.mix(step.states[read].float(), network(taps)), layer.base_layer
    with layer.tape.using(_TailAlone(network.tail)):
        for block, context in zip(stack.layers[read:], step.contexts[read:], strict=True):
            arguments = {"attention_mask": context.attention_mask, "position_embeddings": context.position_embeddings}
            state = block(state, **arguments, **context.attention_kwargs)
        return stack.norm(state)
