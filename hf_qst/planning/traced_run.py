"""Memory and work of one run of a model without values: a training step, or a prompt with its cache."""

from __future__ import annotations

import math
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_qst.planning.operators import tensors, work_of
from hf_qst.planning.saved_bytes import SavedForBackward
from hf_qst.planning.simulation import Simulation

KEPT, LOGITS, GRADIENTS, CACHE, WORKSPACE = (
    "kept for the backward pass",
    "logits",
    "gradients",
    "KV cache",
    "workspace",
)


@dataclass
class TracedRun:
    """What a run took.

    Attributes:
        at_peak (`dict[str, int]`): bytes at the moment that takes most, by what they are for; weights do not count.
        kept (`int`): bytes kept for the backward pass at the end of the forward pass.
        kept_peak (`int`): most of these at any time, recomputed blocks included.
        gradients (`int`): bytes of all gradients.
        operations: how often operations of each kind ran: (products, bytes moved, float32) -> number.
    """

    at_peak: dict[str, int]
    kept: int = 0
    kept_peak: int = 0
    gradients: int = 0
    operations: Counter = field(default_factory=Counter)

    @property
    def peak(self) -> int:
        return sum(self.at_peak.values())

    @property
    def products(self) -> int:
        """Floating-point operations in matrix products."""
        return sum(key[0] * count for key, count in self.operations.items())


@dataclass
class _Storage:
    """One allocation, with the numbers of the operations at which its state changed."""

    size: int
    is_logits: bool
    born: int
    died: float = float("inf")
    saved: float = float("inf")
    released: float = float("inf")

    def lives(self, at: int) -> bool:
        return self.born <= at < self.died

    def is_kept(self, at: int) -> bool:
        return self.saved <= at < self.released


class _Allocations(TorchDispatchMode):
    """Follows every tensor that operations make until it is freed."""

    def __init__(self, vocabulary: int, kernels: str, deadline: float):
        super().__init__()
        self.deadline = deadline
        self.vocabulary, self.kernels = vocabulary, kernels
        self.live = self.peak = self.time = self.peak_time = 0
        self.peak_workspace = 0
        self.all: list[_Storage] = []
        self.by_key: dict[int, _Storage] = {}
        self.operations: Counter = Counter()
        self._references: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if time.monotonic() > self.deadline:
            raise TimeoutError("following its operations takes longer than it may")
        out = function(*args, **kwargs)
        self.time += 1
        known = {t.untyped_storage()._cdata for t in tensors(args, kwargs)}
        made = [t for t in tensors([out], {}) if t.untyped_storage()._cdata not in known]
        for tensor in made:
            self._follow(tensor)
        if made or function._schema.is_mutable:
            work = work_of(function, args, kwargs, out, self.kernels)
            self.operations[work.products, work.moved, work.wide] += 1
            self._note_peak(work.workspace)
        return out

    def _follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.by_key:
            return
        logits = tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary
        record = self.by_key[key] = _Storage(storage.nbytes(), logits, self.time)
        self.all.append(record)
        self.live += record.size
        self._references[key] = weakref.ref(storage, lambda _: self._freed(key))

    def _freed(self, key: int) -> None:
        record = self.by_key.pop(key)
        del self._references[key]
        record.died = self.time + 1  # what is freed now was there during the last operation
        self.live -= record.size

    def _note_peak(self, workspace: int) -> None:
        if self.live + workspace > self.peak:
            self.peak, self.peak_time, self.peak_workspace = self.live + workspace, self.time, workspace


class _Saved(SavedForBackward):
    """Tells the allocations which of them autograd keeps."""

    def __init__(self, model: nn.Module, allocations: _Allocations):
        super().__init__(model)
        self.allocations = allocations

    def _pack(self, tensor: torch.Tensor):
        self._note(tensor)
        return super()._pack(tensor)

    def _recompute(self, tensor: torch.Tensor) -> None:
        self._note(tensor)
        super()._recompute(tensor)

    def _note(self, tensor: torch.Tensor) -> None:
        record = self.allocations.by_key.get(tensor.untyped_storage()._cdata)
        if record is not None:
            record.saved = min(record.saved, self.allocations.time)
            record.released = float("inf")

    def _release(self, key: int) -> None:
        super()._release(key)
        record = self.allocations.by_key.get(key)
        if record is not None and key not in self._kept:
            record.released = self.allocations.time


def training_step(
    simulation: Simulation, inputs: Mapping, vocabulary: int, autocast=None, limit: float = math.inf
) -> TracedRun:
    """Forward and backward pass of the model's loss, without the optimiser's step.

    Args:
        simulation: of a model in training mode.
        inputs: the model's arguments, tensors of which only the shapes count; with labels.
        vocabulary (`int`): width of what counts as logits.
        autocast (`torch.dtype`, *optional*)
        limit (`float`): seconds that this may take.

    Raises:
        TimeoutError: it takes longer.
    """
    model = simulation.model
    allocations = _Allocations(vocabulary, simulation.kernels, time.monotonic() + limit)
    with simulation.running(autocast):
        fakes = _fakes(simulation, inputs)
        with allocations, _Saved(model, allocations) as saved:
            output = model(**fakes)
            loss = getattr(output, "loss", None)
            loss = output[0].float().sum() if loss is None else loss
            del output  # as a trainer does
            kept = saved.live
            torch.autograd.backward(loss)
            kept_peak = saved.peak
    gradients = {p.grad.untyped_storage()._cdata: p.grad for p in model.parameters() if p.grad is not None}
    owners = {id(allocations.by_key[key]) for key in gradients if key in allocations.by_key}
    run = _result(allocations, lambda record, at: GRADIENTS if id(record) in owners else None)
    run.kept, run.kept_peak = kept, kept_peak
    run.gradients = sum(g.numel() * g.element_size() for g in gradients.values())
    return run


def prompt(
    simulation: Simulation, inputs: Mapping, vocabulary: int, autocast=None, limit: float = math.inf
) -> TracedRun:
    """A prompt read into an empty cache; the logits of its last token. Args as of `training_step`."""
    allocations = _Allocations(vocabulary, simulation.kernels, time.monotonic() + limit)
    with simulation.running(autocast), torch.no_grad():
        fakes = _fakes(simulation, inputs)
        with allocations:
            output = simulation.model(**fakes, use_cache=True)
            held = {t.untyped_storage()._cdata for t in _cached(output)}
            owners = {
                id(allocations.by_key[key]): allocations.by_key[key].size for key in held & allocations.by_key.keys()
            }
    run = _result(allocations, lambda record, at: CACHE if id(record) in owners else None)
    run.at_peak[CACHE] = sum(owners.values())  # as it is at the end: each token that follows needs all of it
    return run


def _fakes(simulation: Simulation, inputs: Mapping) -> dict:
    return {name: simulation.fake(v) if isinstance(v, torch.Tensor) else v for name, v in inputs.items()}


def _cached(output) -> list[torch.Tensor]:
    layers = getattr(getattr(output, "past_key_values", None), "layers", ())
    return [value for layer in layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]


def _result(allocations: _Allocations, owner: Callable) -> TracedRun:
    at, found = allocations.peak_time, Counter()
    for record in allocations.all:
        if record.lives(at):
            kind = owner(record, at) or (LOGITS if record.is_logits else KEPT if record.is_kept(at) else WORKSPACE)
            found[kind] += record.size
    found[WORKSPACE] += allocations.peak_workspace
    return TracedRun(dict(found), operations=allocations.operations)
