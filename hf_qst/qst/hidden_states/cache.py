"""Takes the states of a batch from the disk, and runs the base for those that are not there.

A side network reads a few of the base's states, and the head (or a tail) goes on from one. For a fixed text none of them
changes while a side network is trained, so the blocks of the base run once for each example. Weights, configuration, format
and what is read are in the name of the folder in which states are kept; each example's tokens are in its key.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from hf_qst.qst.hidden_states import fingerprints, refusals
from hf_qst.qst.hidden_states.config import HiddenStateCacheConfig, HiddenStateCacheError
from hf_qst.qst.hidden_states.examples import Example, examples_of
from hf_qst.qst.hidden_states.formats import decode, encode, part_names
from hf_qst.qst.hidden_states.shards import Counts, Parts, Shards
from hf_qst.saved import write_text

logger = logging.getLogger(__name__)

# The norm of the difference between stored and computed states, of the computed ones' norm: int8 takes 0.015 of it in
# SmolLM2's last state. States of another model differ by about 1.
_TOLERANCE = 0.05


class StoredStates:
    """The stored states of one batch, in the base's place.

    Args:
        plan: what is stored.
        storage: how, see `HiddenStateCacheConfig`.
        examples: of the batch [batch, seq].
        parts: of each example, by its key.
        shape: (batch, seq).
    """

    def __init__(self, plan, storage: str, examples: list[Example], parts: dict[bytes, Parts], shape: tuple[int, int]):
        self.plan, self.storage, self.examples, self.parts, self.shape = plan, storage, examples, parts, shape

    def leaving(self, index: int, entering: torch.Tensor) -> torch.Tensor | None:
        """The output [batch, seq, d] of base block `index`, or a stand-in where nothing reads it; None in a tail."""
        if index >= self.plan.blocks:
            return None
        if index not in self.plan.states:
            return entering
        return self.tensor(f"state.{index}", entering.dtype, entering.device)

    def tapped(self, index: int, device: torch.device) -> torch.Tensor | None:
        """A downsampler's reading of that output, if it is stored."""
        return self.tensor(f"tap.{index}", None, device) if index in self.plan.taps else None

    def tensor(self, name: str, dtype: torch.dtype | None, device: torch.device) -> torch.Tensor:
        """One of the plan's tensors [batch, seq, width]; zero where there is no token."""
        parts = {part: self._placed(part).to(device) for part in part_names(name, self.storage)}
        return decode(name, parts, self.storage, dtype)

    def _placed(self, part: str) -> torch.Tensor:
        tensors = [self.parts[example.key][part] for example in self.examples]
        if sum(map(len, tensors)) == self.shape[0] * self.shape[1]:
            return torch.cat(tensors).view(*self.shape, -1)
        whole = tensors[0].new_zeros(*self.shape, tensors[0].shape[-1])
        for example, tensor in zip(self.examples, tensors, strict=True):
            whole[example.row, example.start : example.stop] = tensor
        return whole


class _Recording:
    """A pass of the base that no network reads, which keeps what a plan stores."""

    def __init__(self, network, plan, storage: str):
        self.network, self.plan, self.storage = network, plan, storage
        self.parts: Parts = {}

    def reads(self, index: int) -> bool:
        return index in self.plan.states or index in self.plan.taps

    def replaced(self, index: int, entering: torch.Tensor) -> torch.Tensor | None:
        return entering if index >= self.plan.blocks else None

    def starts_tail(self, index: int) -> bool:
        return False

    def updated(self, name: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return output

    def record(self, index: int, entering, leaving: torch.Tensor, context) -> None:
        if index in self.plan.states:
            self.parts |= encode(f"state.{index}", leaving, self.storage)
        else:
            downsample = self.network.downsample[self.network.places.index(index)]
            self.parts |= encode(f"tap.{index}", downsample.tap(leaving), self.storage)

    def of(self, example: Example, row: int) -> Parts:
        """The parts of an example that was in row `row`."""
        return {name: part[row, example.start : example.stop].clone() for name, part in self.parts.items()}


class HiddenStateCache:
    """The cache of one side network. Only a decoder stack's layer, with the network active, can use it.

    Args:
        config ([`HiddenStateCacheConfig`])
        stack: the base's decoder stack, which is checked.
        tail_layers: of the network.

    Raises:
        HiddenStateCacheError: the base's states cannot be stored; the message has the reason.
    """

    def __init__(self, config: HiddenStateCacheConfig, stack, tail_layers: int):
        refusals.check_stack(stack, tail_layers)
        self.config = config
        self._start()

    def _start(self) -> None:
        self.counts = Counts()
        self._base = None  # the tensors that were hashed last, and their fingerprint
        self._separates = None  # whether the base keeps packed sequences apart, once it is known
        self._said = False
        self._forget()

    def _forget(self) -> None:
        self.shards: Shards | None = None
        self.plan = None
        self._stamp, self._checked = None, False

    def __getstate__(self):
        # A copy opens the folder again.
        return {"config": self.config}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._start()

    def close(self) -> None:
        """Write what is not written yet."""
        if self.shards is not None:
            self.shards.writer.flush()
        self._forget()

    def serves(self, stack: nn.Module, inputs: dict) -> bool:
        """Whether this call of the stack asks for nothing but its last state: no keys and values, no states in between."""
        asks = ("output_hidden_states", "output_attentions", "output_router_logits")
        wanted = [name for name in asks if inputs.get(name, getattr(stack.config, name, False))]
        if wanted and torch.is_grad_enabled() and not self._said:
            self._said = True
            logger.warning("hidden-state cache: %s is set, so the base runs in this step and the like", wanted[0])
        filled = inputs.get("past_key_values") is not None or inputs.get("cache") is not None
        return not wanted and not inputs["use_cache"] and not filled

    @torch.compiler.disable
    @torch.no_grad()
    def stored(self, layer, network, inputs: dict) -> StoredStates | None:
        """The states of a batch; those that were not stored are computed and stored.

        Args:
            layer ([`QSTLayer`])
            network ([`SideNetwork`]): of the layer, whose cache this is.
            inputs: of the layer's stack.

        Raises:
            HiddenStateCacheError: stored states would be wrong in this call; or the stored ones are not the base's.
        """
        refusals.check_call(layer.base_layer, inputs)
        self.open(layer, network, inputs["input_ids"].device)
        examples = self.examples(layer, network, inputs)
        if not examples:
            return None  # nothing but padding
        parts = {example.key: self.shards.get(example.key) for example in examples}
        if not self._checked and any(found is not None for found in parts.values()):
            self._check(layer, network, inputs, examples, parts)
        missing = {example.key: example for example in examples if parts[example.key] is None}
        if missing:
            for example, computed in self.compute(layer, network, inputs, list(missing.values())):
                parts[example.key] = computed
                self.shards.writer.put(example.key, computed)
        self.counts.missing += len(missing)
        self.counts.found += len(parts) - len(missing)
        return StoredStates(self.plan, self.config.storage, examples, parts, tuple(inputs["input_ids"].shape))

    def open(self, layer, network, device: torch.device) -> None:
        """Open the folder of this base and network, unless it is open and neither has changed."""
        stack = layer.base_layer
        modules = dict(stack.named_modules())
        refusals.check_modules(modules, stack.get_input_embeddings())
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        if self._stamp is None:
            # Once before any state is replaced: blocks show the form of their output, and bitsandbytes packs its weights.
            layer.make_blocks_replaceable()
            self._last_state(layer, network, input_ids=torch.zeros(1, 1, dtype=torch.long, device=device))
            if network.tail is not None:
                refusals.check_below_tail(layer.hook_handles, network.tail.first)
        tensors = fingerprints.stamp(modules.values(), network.downsample)
        stamp = tensors, autocast
        if stamp == self._stamp:
            return
        self.close()
        storage, root = self.config.storage, Path(self.config.folder)
        self.plan = fingerprints.plan_of(network)
        if self._base is None or self._base[0] != tensors:
            self._base = tensors, fingerprints.base_fingerprint(stack)
        described = fingerprints.description(self.plan, self._base[1], storage, str(autocast))
        folder = root / fingerprints.digest(described)[:32]
        parts = [part for name in self.plan.names for part in part_names(name, storage)]
        self.shards = Shards(folder, root, self.config.size_limit, parts, self.counts)
        if not (folder / "description.json").exists():
            write_text(folder / "description.json", json.dumps(described, indent=1) + "\n")
        logger.info("hidden-state cache: %s holds %d examples", folder, len(self.shards))
        self._stamp, self._checked = stamp, False

    def examples(self, layer, network, inputs: dict) -> list[Example]:
        """The examples of a batch, see `hf_qst.qst.hidden_states.examples`."""
        packed = inputs.get("position_ids") is not None and inputs.get("attention_mask") is None
        if packed and self._separates is None:
            # Whether a sequence depends on the one in front of it. Attention keeps them apart by their positions in most
            # types, but not in all; convolutions and recurrences do not.
            device = inputs["input_ids"].device
            places = torch.zeros(1, 2, dtype=torch.long, device=device)
            one, other = (
                self._last_state(
                    layer, network, input_ids=torch.tensor([[first, 4]], device=device), position_ids=places
                )
                for first in (3, 5)
            )
            self._separates = bool((one - other)[:, 1].norm() <= 1e-3 * one[:, 1].norm())
        return examples_of(inputs, bool(self._separates))

    def _last_state(self, layer, network, **inputs) -> torch.Tensor:
        """The last state [batch, seq, d] that is stored of anything, computed by the base, in which every block runs."""
        last, count = network.places[-1], len(layer.blocks)
        recording = _Recording(network, fingerprints.Plan(count, (last,), {}), "full")
        with layer.tape.using(recording):
            layer.base_layer(**inputs, use_cache=False)
        return recording.parts[f"state.{last}"]

    def _check(self, layer, network, inputs: dict, examples: list[Example], parts: dict[bytes, Parts | None]) -> None:
        """Compare one stored example with the base, once in each process."""
        # Of packed sequences one with others in front of it.
        found = (example for example in examples if parts[example.key] is not None)
        example = max(found, key=lambda example: example.start)
        ((_, computed),) = self.compute(layer, network, inputs, [example])
        length = example.stop - example.start
        whole = [Example(0, 0, length, example.key)]
        stored, right = (
            StoredStates(self.plan, self.config.storage, whole, {example.key: found}, (1, length))
            for found in (parts[example.key], computed)
        )
        for name in self.plan.names:
            ours, bases = (states.tensor(name, torch.float32, torch.device("cpu")) for states in (stored, right))
            difference = ((ours - bases).norm() / bases.norm().clamp_min(1e-30)).item()
            if not difference <= _TOLERANCE:
                raise HiddenStateCacheError(
                    f"the base computes other states than those stored in {self.shards.folder}: {name} of an example "
                    f"differs by {difference:.2g} of its norm. Something that neither its weights nor its inputs show changes "
                    "them, such as a hook; remove it, or remove that folder"
                )
        self._checked = True

    def compute(self, layer, network, inputs: dict, wanted: list[Example]) -> Iterator[tuple[Example, Parts]]:
        """The parts of examples of a batch, from a forward of the base over their rows."""
        recording = _Recording(network, self.plan, self.config.storage)
        rows = sorted({example.row for example in wanted})
        with layer.tape.using(recording):
            layer.base_layer(**_rows_of(inputs, rows), use_cache=False)
        for example in wanted:
            yield example, recording.of(example, rows.index(example.row))


def _rows_of(inputs: dict, rows: list[int]) -> dict:
    """The inputs of some rows. Lengths of packed sequences are of a batch of one row."""
    batch = len(inputs["input_ids"])
    given = {name: value for name, value in inputs.items() if name in refusals.KNOWN and value is not None}
    if len(rows) == batch:
        return given
    index = torch.tensor(rows, device=inputs["input_ids"].device)
    return {
        name: value[index] if len(value) == batch else value
        for name, value in given.items()
        if isinstance(value, torch.Tensor)
    }
