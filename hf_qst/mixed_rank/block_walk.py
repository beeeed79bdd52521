"""Batches go through a model block by block: all through the first block, then all through the second.

One block is needed at a time then, and what is made of its inputs can be used before the next block runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass

import torch
from torch import nn

from hf_qst.base_model.block_calls import first_argument, hidden_of, with_first_argument
from hf_qst.base_model.decoder_stack import UnsupportedArchitectureError
from hf_qst.base_model.disk_weights import comes_from_disk
from hf_qst.base_model.encoder_blocks import find_blocks
from hf_qst.calibration import CalibrationRun, hooks
from hf_qst.mixed_rank.predictions import installed


class Reached(Exception):
    """Ends a forward pass where all inputs that were wanted are known."""


@dataclass
class Call:
    """The arguments of one block in one batch but the hidden state: masks and positions, which the streams share."""

    args: tuple
    kwargs: dict

    def __call__(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        args, kwargs = with_first_argument(self.args, self.kwargs, lambda _: hidden)
        return hidden_of(block(*args, **kwargs))


class BlockWalk:
    """How a run's batches get to a list of blocks, and what each block is called with.

    Args:
        run: of the model, prepared.
        blocks (`str`): path of the list.
        batch: any of those that are run; its first sample is tried.

    Attributes:
        skips (`bool`): whether the calls do not depend on what the blocks compute, so that no block runs before its turn.

    Raises:
        UnsupportedArchitectureError: they depend on it, and the blocks' weights are on disk.
    """

    def __init__(self, run: CalibrationRun, blocks: str, batch: Mapping):
        self.run = run
        self.layers = list(run.model.get_submodule(blocks))
        self.paths = [f"{blocks}.{i}." for i in range(len(self.layers))]
        trial = run.first_sample(run.enter(batch))
        real, _, outputs = _calls(run, self.layers, trial)
        made = enumerate(zip(self.layers, outputs, strict=False))
        self._stand_ins = {f"{blocks}.{i}": _PassedOn(layer, output) for i, (layer, output) in made}
        passed = self._passed(trial) if len(outputs) == len(self.layers) else None
        self.skips = passed is not None and _same(real, passed)
        if not self.skips and comes_from_disk(self.layers[0]):
            raise UnsupportedArchitectureError(
                f"the blocks of {type(run.model).__name__} hand on more than the hidden state, so that none can run by itself "
                "with the weights of the others on disk: load the model as far as it fits into memory, and call compress_model"
            )

    def _passed(self, trial: dict) -> list[Call] | None:
        """The calls without what the blocks compute; None if the model needs more of it than the hidden state."""
        try:
            with installed(self.run.model, self._stand_ins):
                return _calls(self.run, list(self._stand_ins.values()), trial)[0]
        except (AttributeError, TypeError, ValueError):
            return None

    def start(self, batches: Sequence[Mapping]) -> tuple[list[list[Call]], list[torch.Tensor | None]]:
        """By batch: the call of every block, and the hidden state that enters the first (None: the batch reaches none)."""
        model, found = self.run.model, []
        blocks = list(self._stand_ins.values()) if self.skips else self.layers
        with installed(model, self._stand_ins) if self.skips else nullcontext():
            for batch in batches:
                found.append(_calls(self.run, blocks, self.run.enter(batch)))
        return [calls for calls, _, _ in found], [state for _, state, _ in found]

    @contextmanager
    def ending_in(self, state: torch.Tensor) -> Iterator[None]:
        """The model runs without its blocks meanwhile: `state` is what leaves the last. Only where the walk `skips`."""
        path, last = list(self._stand_ins.items())[-1]
        with installed(self.run.model, self._stand_ins | {path: _Leaving(last, state)}):
            yield


def by_blocks(model: nn.Module, groups: Sequence[tuple[str, ...]]) -> list[tuple[str | None, list[tuple[str, ...]]]]:
    """Each list of blocks with its groups of layers, in the order in which they run; one None with all where some lie in
    none."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for group in groups:
        inside = [path for path in find_blocks(model) if all(name.startswith(f"{path}.") for name in group)]
        if not inside:
            return [(None, list(groups))]
        found.setdefault(inside[0], []).append(group)
    return list(found.items())


class StandIn(nn.Module):
    """Stands in the place of a module and has its attributes."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


class _PassedOn(StandIn):
    """Gives the hidden state of a block as it is, in the form of the block's output, and None for what else there is."""

    def __init__(self, block: nn.Module, output):
        super().__init__(block)
        self.others = (None,) * (len(output) - 1) if isinstance(output, tuple) else None

    def forward(self, *args, **kwargs):
        state = first_argument(args, kwargs)
        return state if self.others is None else (state, *self.others)


class _Leaving(StandIn):
    """Gives this state, in the form that another stand-in gives what enters it."""

    def __init__(self, other: _PassedOn, state: torch.Tensor):
        super().__init__(other)
        self.state = state

    def forward(self, *args, **kwargs):
        return self.module(self.state)


def _same(one, other) -> bool:
    """Whether two calls, or lists and mappings of their arguments, are equal; tensors by their values."""
    if torch.is_tensor(one):
        return torch.is_tensor(other) and torch.equal(one, other)
    if isinstance(one, Call):
        return _same((one.args, one.kwargs), (other.args, other.kwargs))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return one is other or one == other


def _calls(run: CalibrationRun, blocks: Sequence[nn.Module], inputs: dict) -> tuple[list, torch.Tensor | None, list]:
    """Each block's call in one run, the state that enters the first (None: it is not reached), and all outputs."""
    calls: list[Call] = []
    states: list[torch.Tensor] = []
    outputs: list = []

    def record(block, args, kwargs):
        states.append(first_argument(args, kwargs))
        calls.append(Call(*with_first_argument(args, kwargs, lambda _: None)))

    def keep(block, args, output):
        outputs.append(output)
        if block is blocks[-1]:
            raise Reached

    handles = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]
    with hooks([*handles, *(block.register_forward_hook(keep) for block in blocks)]), suppress(Reached):
        run.run_inputs(inputs)
    return calls, states[0] if states else None, outputs
