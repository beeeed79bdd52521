"""Fills a hidden-state cache ahead of training, and gives a model a cache after it was made."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_qst.base_model.decoder_stack import find_decoder_stack
from hf_qst.base_model.offloading import input_device
from hf_qst.calibration import as_batches
from hf_qst.qst.hidden_states import refusals
from hf_qst.qst.hidden_states.cache import HiddenStateCache, StoredStates
from hf_qst.qst.hidden_states.config import HiddenStateCacheConfig, HiddenStateCacheError
from hf_qst.qst.hidden_states.examples import Example
from hf_qst.qst.hidden_states.shards import folder_bytes
from hf_qst.qst.layer import QSTLayer
from hf_qst.tuner.manifest_tuner import with_head


@dataclass(frozen=True)
class FillReport:
    """What filling took.

    Args:
        examples: that the data has, each counted once; `stored` of them were computed, the others were there.
        tokens: of the computed ones.
        bytes_per_token: on the disk.
        bytes_written: by this process.
        seconds: of computing and writing.
        base_seconds: a token takes the base.
        read_seconds: reading a token's states takes.
        break_even_epochs: after so many epochs the time that filling takes is saved; infinite where reading takes as long
            as the base.
    """

    examples: int
    stored: int
    tokens: int
    bytes_per_token: float
    bytes_written: int
    seconds: float
    base_seconds: float
    read_seconds: float
    break_even_epochs: float


def hidden_state_cache(model: nn.Module) -> HiddenStateCache | None:
    """The cache of a model's active side network, with its `counts`; None if it has none."""
    network = _layer(model).active_network()
    return None if network is None else network.hidden_states


def set_hidden_state_cache(model: nn.Module, cache: str | HiddenStateCacheConfig | None) -> None:
    """Give the active side network of a model this cache, for example after it was loaded; None takes it away.

    Raises:
        HiddenStateCacheError: the base's states cannot be stored; the message has the reason.
    """
    network = _layer(model).active_network()
    if network is None:
        raise ValueError("set_hidden_state_cache: the model has no active side network; call set_adapter(name)")
    if network.hidden_states is not None:
        network.hidden_states.close()
    tail = 0 if network.tail is None else len(_layer(model).blocks) - network.tail.first
    network.hidden_states = (
        None
        if cache is None
        else HiddenStateCache(HiddenStateCacheConfig.of(cache), find_decoder_stack(with_head(model)), tail)
    )


def _layer(model: nn.Module) -> QSTLayer:
    layer = next((module for module in model.modules() if isinstance(module, QSTLayer)), None)
    if layer is None:
        raise ValueError(f"a hidden-state cache belongs to a model with a QST adapter, got {type(model).__name__}")
    return layer


@torch.no_grad()
def fill_hidden_state_cache(
    model: nn.Module, data: Iterable[Mapping], rank: int = 0, world_size: int = 1, progress: bool = True
) -> FillReport:
    """Compute and store the base's states of all examples in `data` that are not stored yet.

    Before it starts it says how many bytes and about how many seconds that takes, and after how many epochs it has paid
    for itself.

    Args:
        model: with a QST adapter that has a cache.
        data: batches of model inputs, such as `trainer.get_train_dataloader()`, or the rows of a tokenised data set. What
            training gives the model must be in it: token ids, and how a row is padded or packed.
        rank, world_size (`int`): this process computes every `world_size`-th batch, from number `rank` on, of data that all
            processes see alike. A data loader that Trainer made is divided among its processes already.
        progress (`bool`): show a progress bar and print what it says.

    Raises:
        HiddenStateCacheError: the model has no cache, or stored states would be wrong.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"fill_hidden_state_cache: rank must be in [0, world_size={world_size}), got {rank}")
    filling = _Filling(model)
    batches = [filling.inputs(batch) for batch in as_batches(data, argument="data", model=with_head(model))]
    todo = filling.missing(batches[rank::world_size])
    if not todo:
        return filling.report()
    filling.time(*todo[0])
    say = tqdm.write if progress else lambda text: None
    say(filling.prediction(sum(example.stop - example.start for _, wanted in todo for example in wanted)))
    for inputs, wanted in tqdm(todo, desc="hidden states", unit="batch", disable=not progress):
        filling.store(inputs, wanted)
    filling.shards.writer.flush()
    report = filling.report()
    say(
        f"{report.stored:,} examples stored in {report.seconds:.1f} s, {report.bytes_written / 2**20:,.1f} MiB in "
        f"{filling.shards.folder}"
    )
    return report


class _Filling:
    """One filling: what is missing, and what it takes."""

    def __init__(self, model: nn.Module):
        self.layer, self.cache, self.device = _layer(model), hidden_state_cache(model), input_device(model)
        if self.cache is None:
            raise HiddenStateCacheError(
                "fill_hidden_state_cache: the model's side network has no cache; set QSTConfig.hidden_state_cache or call "
                "set_hidden_state_cache(model, folder)"
            )
        self.network = self.layer.active_network()
        self.cache.open(self.layer, self.network, self.device)
        self.shards, self.written = self.cache.shards, self.cache.counts.bytes_written
        self.examples = self.stored = self.tokens = 0
        self.seconds = self.bytes_per_token = self.base_seconds = self.read_seconds = 0.0

    def inputs(self, batch: Mapping) -> dict:
        """What the stack gets of a batch."""
        inputs = {
            name: value.to(self.device) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
            if name in refusals.KNOWN or name == "inputs_embeds"
        }
        refusals.check_call(self.layer.base_layer, inputs)
        return inputs

    def missing(self, batches: list[dict]) -> list[tuple[dict, list[Example]]]:
        """The batches with the examples that are not stored, each once."""
        seen, todo = set(), []
        for inputs in batches:
            found = {example.key: example for example in self.cache.examples(self.layer, self.network, inputs)}
            new = {key: example for key, example in found.items() if key not in seen}
            seen |= new.keys()
            wanted = [example for key, example in new.items() if self.shards.get(key) is None]
            if wanted:
                todo.append((inputs, wanted))
        self.examples = len(seen)
        return todo

    def time(self, inputs: dict, wanted: list[Example]) -> None:
        """Time one batch: computing it, and reading it."""
        parts = {example.key: found for example, found in self._computed(inputs, wanted)}  # the first is slower
        start = time.perf_counter()
        parts = {example.key: found for example, found in self._computed(inputs, wanted)}
        middle = time.perf_counter()
        tokens = sum(example.stop - example.start for example in wanted)
        shape = tuple(inputs["input_ids"].shape)
        states = StoredStates(self.cache.plan, self.cache.config.storage, wanted, parts, shape)
        for name in self.cache.plan.names:
            states.tensor(name, None, self.device)
        self._wait()
        self.base_seconds = (middle - start) / tokens
        self.read_seconds = (time.perf_counter() - middle) / tokens
        held = sum(part.nbytes for example in wanted for part in parts[example.key].values())
        self.bytes_per_token = held / tokens

    def _computed(self, inputs: dict, wanted: list[Example]):
        computed = list(self.cache.compute(self.layer, self.network, inputs, wanted))
        self._wait()
        return computed

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def prediction(self, tokens: int) -> str:
        """What filling will take."""
        config, size = self.cache.config, tokens * self.bytes_per_token
        free = shutil.disk_usage(config.folder).free
        limit = (
            ""
            if config.size_limit is None
            else f", {_gib(config.size_limit - folder_bytes(Path(config.folder)))} of size_limit"
        )
        return (
            f"{tokens:,} tokens to store, {self.bytes_per_token:,.0f} bytes each ({config.storage}): {_gib(size)} of {_gib(free)} "
            f"free{limit}; about {tokens * self.base_seconds:,.0f} s, saved again after {self.break_even():.1f} epochs"
        )

    def break_even(self) -> float:
        saved = self.base_seconds - self.read_seconds
        taken = self.seconds / self.tokens if self.tokens else self.base_seconds
        return taken / saved if saved > 0 else math.inf

    def store(self, inputs: dict, wanted: list[Example]) -> None:
        start = time.perf_counter()
        for example, parts in self.cache.compute(self.layer, self.network, inputs, wanted):
            self.shards.writer.put(example.key, parts)
            self.tokens += example.stop - example.start
        self.stored += len(wanted)
        self.seconds += time.perf_counter() - start

    def report(self) -> FillReport:
        written = self.cache.counts.bytes_written - self.written
        return FillReport(
            self.examples, self.stored, self.tokens, self.bytes_per_token, written, self.seconds, self.base_seconds,
            self.read_seconds, self.break_even(),
        )  # fmt: skip


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
