"""Training on the stored hidden states of a frozen base.

The base is the same for every side network and never changes, so its states are computed once for each batch; a training
step is then the side network, the blocks of a tail, the head and the optimiser.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn

from benchmarks.side_tuning.tasks import Batch
from hf_qst import QSTConfig
from hf_qst.qst import Taps
from hf_qst_kernels import linear_cross_entropy


@dataclass
class Row:
    """Of one row of tokens: by number i the state that enters block i, or leaves the last one [seq, d] in float16, and the
    normalised output of the stack in float32."""

    states: dict[int, torch.Tensor]
    output: torch.Tensor


@dataclass
class Step:
    """Of one batch: its rows, and what the base gave each block."""

    batch: Batch
    rows: list[Row]
    contexts: list

    def state(self, i: int) -> torch.Tensor:
        """The state that enters block i, or leaves the last one [rows, seq, d] in float32."""
        return torch.stack([row.states[i] for row in self.rows]).float()

    def normal_state(self, i: int) -> torch.Tensor:
        """`state`, divided by the root mean square of its channels."""
        state = self.state(i)
        return F.rms_norm(state, state.shape[-1:])

    @property
    def output(self) -> torch.Tensor:
        """The normalised output of the stack [rows, seq, d] in float32."""
        return torch.stack([row.output for row in self.rows])


class _Recording:
    """Takes the place of a pass that side networks read: keeps the states with the numbers `wanted`."""

    def __init__(self, wanted: Collection[int]):
        self.wanted, self.states, self.contexts = wanted, {}, []

    def reads(self, index) -> bool:
        return True

    def starts_tail(self, index) -> bool:
        return False

    def updated(self, name, x, output):
        return output

    def record(self, index, entering, leaving, context) -> None:
        for number, state in ((index, entering), (index + 1, leaving)):
            if number in self.wanted and number not in self.states:
                self.states[number] = state.half()
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
        return output + self.tail.update(name, x) if self.tail.updates_layer(name) else output


class StoredBase:
    """A base with its head, and the states that it gives for batches."""

    def __init__(self, base: nn.Module):
        # Its hooks around the blocks are wanted, and a side network away from its start, for the check.
        self.model = get_peft_model(copy.deepcopy(base), QSTConfig(task_type="CAUSAL_LM", init_weights=False)).eval()
        self.layer = self.model.base_model.model.model
        self.head = self.model.get_output_embeddings().weight.detach()
        self.contexts: dict[tuple, list] = {}
        self.rows: dict[bytes, Row] = {}

    @torch.no_grad()
    def step(self, batch: Batch, wanted: Collection[int]) -> Step:
        """The base's states for a batch, of those the ones with the numbers `wanted`.

        A row that was in a batch before, in an earlier epoch or with another seed, is not computed again: the base's states
        depend on no other row.
        """
        keys, shape = [row.numpy().tobytes() for row in batch.ids.cpu()], tuple(batch.ids.shape)
        known = all(key in self.rows and self.rows[key].states.keys() >= set(wanted) for key in keys)
        if not known or shape not in self.contexts:
            recording = _Recording(wanted)
            with self.layer.tape.using(recording):
                output = self.layer.base_layer(input_ids=batch.ids, use_cache=False)[0]
            for i, key in enumerate(keys):
                self.rows[key] = Row({number: state[i] for number, state in recording.states.items()}, output[i])
            # Masks and rotary tables of equal shapes are equal: one copy is kept.
            self.contexts.setdefault(shape, recording.contexts)
        return Step(batch, [self.rows[key] for key in keys], self.contexts[shape])

    @torch.no_grad()
    def check(self, batch: Batch) -> None:
        """Compare the loss on stored states with that of the model itself.

        Raises:
            RuntimeError: they differ by more than the states' rounding to float16 explains.
        """
        step = self.step(batch, states_read(self.layer))
        stored = self.loss(hidden(self.layer, step), batch).item()
        whole = self.model(input_ids=batch.ids, labels=batch.labels).loss.item()
        print(f"loss of a random side network on stored states {stored:.5f}, in the model {whole:.5f}")
        if abs(stored - whole) > 1e-3 * abs(whole):
            raise RuntimeError(f"the loss on stored states is {stored}, in the model {whole}")

    def direct_readout(self, layer, steps: Sequence[Step]) -> None:
        """Let the inputs of a readout be those that the loss gradient points at, at a start where its output is zero.

        With g the gradient at the output of the stack and x = h_i / rms(h_i), the loss falls first along the matrix E[g' x]; A_i gets
        its leading right singular vectors, and rows of x A_i' with the mean square that the random start has.
        """
        down = layer.active_network().readout.down
        gradients, squares = dict.fromkeys(down, 0.0), dict.fromkeys(down, 0.0)
        for step in steps:
            output = step.output.requires_grad_()
            (gradient,) = torch.autograd.grad(self.loss(output, step.batch), output)
            for i in down:
                x = step.normal_state(int(i) + 1).flatten(0, 1)
                gradients[i] += gradient.flatten(0, 1).T @ x
                squares[i] += x.T @ x / len(x) / len(steps)
        with torch.no_grad():
            for i, linear in down.items():
                _, strengths, directions = torch.linalg.svd(gradients[i])
                chosen = directions[: len(linear.weight)]
                part = strengths[: len(chosen)].square().sum() / strengths.square().sum()
                print(f"readout of block {i}: its inputs hold {part:.1%} of the gradient's energy")
                mean_square = ((chosen @ squares[i]) * chosen).sum(1, keepdim=True)
                linear.weight.copy_(chosen * (mean_square * 3).rsqrt())

    def loss(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Mean loss in nats a label for the output of a stack [rows, seq, d]."""
        labels = batch.labels[:, 1:].reshape(-1)
        return linear_cross_entropy(hidden[:, :-1].reshape(len(labels), -1), self.head, labels)


def states_read(layer) -> set[int]:
    """Numbers of the states that a side-tuned stack reads."""
    network = layer.active_network()
    tail = set() if network.tail is None else {network.tail.first}
    return {0} | {i + 1 for i in network.read_blocks} | tail


def hidden(layer, step: Step) -> torch.Tensor:
    """The output of a side-tuned stack [rows, seq, d], computed from the stored states of its base."""
    network, taps = layer.active_network(), Taps()
    entering = step.state(0)
    for i in sorted(network.read_blocks):
        network.record(taps, i, entering, step.state(i + 1), step.contexts[i])
    if network.tail is None:
        return network.mix(step.output, network(taps))
    first = network.tail.first
    state = network.mix(step.state(first), network(taps))
    with layer.tape.using(_TailAlone(network.tail)):
        return last_blocks(layer.base_layer, first, state, step)


def last_blocks(stack, first: int, state: torch.Tensor, step: Step) -> torch.Tensor:
    """The output of a stack [rows, seq, d] whose block `first` gets this state [rows, seq, d]."""
    for block, context in zip(stack.layers[first:], step.contexts[first:], strict=True):
        arguments = {"attention_mask": context.attention_mask, "position_embeddings": context.position_embeddings}
        state = block(state, **arguments, **context.attention_kwargs)
    return stack.norm(state)
