"""One forward pass of the base, and the side networks that read it.

The base is the same for every side network. So one pass serves several of them: each computes its own rows of a batch, or
all of them compute all rows and their mixes are averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from hf_qst.qst.side_block import BlockContext
from hf_qst.qst.side_network import SideNetwork, Taps

BASE = "__base__"
"""PEFT's name for no adapter in `adapter_names`."""


class Rows:
    """Some rows of a batch.

    Args:
        indices: their numbers, ascending.
        batch: the number of all rows.
    """

    def __init__(self, indices: Sequence[int], batch: int):
        self.indices, self.batch = list(indices), batch
        first, last = self.indices[0], self.indices[-1]
        # Neighbours are a view of the batch and take no copy.
        self.index = slice(first, last + 1) if last - first + 1 == len(self.indices) else self.indices

    def of(self, name: str, value):
        """These rows of `value`: a tensor [batch, ...], one [1, ...] for all rows, or a tuple of such.

        Raises:
            NotImplementedError: its first axis is not the batch; the message has `name`.
        """
        if isinstance(value, (tuple, list)):
            return type(value)(self.of(name, part) for part in value)
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, torch.Tensor) and (value.dim() == 0 or value.shape[0] == 1 != self.batch):
            return value
        if isinstance(value, torch.Tensor) and value.shape[0] == self.batch:
            return value[self.index]
        kind = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise NotImplementedError(
            f"a batch with several adapters cannot be divided by rows: the base gives its blocks {name} as {kind}, which "
            f"has no axis of {self.batch} rows. Use one adapter for all rows"
        )

    def of_context(self, context: BlockContext) -> BlockContext:
        """The same for the arguments of a block."""
        return replace(
            context,
            attention_mask=self.of("attention_mask", context.attention_mask),
            position_embeddings=self.of("position_embeddings", context.position_embeddings),
            attention_kwargs={name: self.of(name, value) for name, value in context.attention_kwargs.items()},
        )


def rows_by_name(names: Sequence[str], batch: int) -> list[tuple[str, Rows | None]]:
    """The rows of each adapter in `names`, one name a row, by name; `__base__` is left out, None stands for all rows.

    Raises:
        ValueError: another number of names than rows, in PEFT's words.
    """
    if len(names) != batch:
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names)} and {batch} respectively."
        )
    found: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        found.setdefault(name, []).append(row)
    return [
        (name, None if len(rows) == batch else Rows(rows, batch))
        for name, rows in sorted(found.items())
        if name != BASE
    ]


class Reader:
    """A side network in a pass: its taps, and what it makes of them.

    Args:
        name, network: the adapter.
        rows: those that it computes; None for all.
        grad: whether the caller computes gradients.
        cache: the base's cache, or None.
        first_layer: number of this network's first layer in it.
        stored: states that stand in for those of the base's frozen blocks, which then do not run.
    """

    def __init__(
        self, name: str, network: SideNetwork, rows: Rows | None, grad: bool, cache, first_layer: int, stored=None
    ):
        self.name, self.network, self.rows, self.grad, self.tail = name, network, rows, grad, network.tail
        self.cache, self.first_layer, self.stored = cache, first_layer, stored
        self.taps = Taps()

    def of(self, state: torch.Tensor) -> torch.Tensor:
        return state if self.rows is None else self.rows.of("a state", state)

    def mixed(self, frozen: torch.Tensor) -> torch.Tensor:
        """This network's rows of the last state of the base's frozen part [batch, seq, d], mixed with its output."""
        side = self.network(self.taps, self.cache, self.first_layer)
        return self.network.mix(self.of(frozen).detach(), side.to(frozen.device))

    def record(self, index: int, entering: torch.Tensor, leaving: torch.Tensor, context: BlockContext) -> None:
        if index not in self.network.read_blocks:
            return
        # A copy for each network, which keeps its own rotary tables in it until the backward pass.
        context = replace(context) if self.rows is None else self.rows.of_context(context)
        entering = self.of(entering) if index == 0 else entering
        known = () if self.stored is None else (self.stored.tapped(index, leaving.device),)
        if not self.grad:
            return self.network.record(self.taps, index, entering, self.of(leaving), context, *known)
        # The base runs without gradients, but a trainable downsampler needs them for its weight.
        with torch.enable_grad():
            self.network.record(self.taps, index, entering.detach(), self.of(leaving).detach(), context, *known)

    def updated(self, name: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The output of the base's layer called `name` for input x, with this network's low-rank update."""
        if self.tail is None or not self.tail.updates_layer(name):
            return output
        if self.rows is not None and x.shape[0] != self.rows.batch:
            raise NotImplementedError(
                f"the tail of adapter {self.name!r} cannot be mixed with other adapters in a batch: layer {name!r} of the "
                f"base gets its input as {list(x.shape)}, without an axis of {self.rows.batch} rows. Use one adapter for "
                "all rows"
            )
        update = self.tail.update(name, self.of(x)).to(output.device, output.dtype)
        return output + update if self.rows is None else _placed(output, self, self.of(output) + update)


def _placed(batch: torch.Tensor, reader: Reader, rows: torch.Tensor) -> torch.Tensor:
    """A copy of `batch` with the reader's rows in their places."""
    batch = batch.clone()
    batch[reader.rows.index] = rows
    return batch


class BasePass:
    """One forward pass of the base, which its hooks find as `tape.current`.

    Args:
        readers: the side networks that read it.
        grad: whether the caller computes gradients.
    """

    def __init__(self, readers: list[Reader], grad: bool):
        self.readers, self.grad = readers, grad

    def reads(self, index: int) -> bool:
        """Whether anything of base block `index` is kept."""
        return any(index in reader.network.read_blocks for reader in self.readers)

    def replaced(self, index: int, entering: torch.Tensor) -> torch.Tensor | None:
        """The output of base block `index`, which need not run then; None if it must."""
        if any(reader.stored is None for reader in self.readers):
            return None
        states = [reader.stored.leaving(index, entering) for reader in self.readers]
        # What one network does not read, another may.
        return next((state for state in states if state is not entering), entering)

    def record(self, index: int, entering: torch.Tensor, leaving: torch.Tensor, context: BlockContext) -> None:
        for reader in self.readers:
            reader.record(index, entering, leaving, context)

    def starts_tail(self, index: int) -> bool:
        return any(reader.tail is not None and reader.tail.first == index for reader in self.readers)

    def enter_tail(self, index: int, state: torch.Tensor) -> torch.Tensor:
        """The state that enters block `index` [batch, seq, d], mixed where a tail starts."""
        starting = [reader for reader in self.readers if reader.tail is not None and reader.tail.first == index]
        return self._mixed(state, starting)

    def updated(self, name: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The output of the base's layer called `name` with the updates of all tails."""
        for reader in self.readers:
            output = reader.updated(name, x, output)
        return output

    def leave(self, state: torch.Tensor) -> torch.Tensor:
        """The output of the base's stack [batch, seq, d_out], mixed for the networks without a tail."""
        return self._mixed(state, [reader for reader in self.readers if reader.tail is None])

    def _mixed(self, state: torch.Tensor, readers: list[Reader]) -> torch.Tensor:
        whole = [reader.mixed(state) for reader in readers if reader.rows is None]
        if len(whole) > 1:
            return torch.stack(whole).mean(0)
        state = whole[0] if whole else state
        for reader in readers:
            if reader.rows is not None:
                state = _placed(state, reader, reader.mixed(state))
        return state
