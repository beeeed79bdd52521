"""Input statistics of a model's modules, from one streaming pass over a few batches.

What is kept of a module's inputs X [rows, d] is its uncentred second moment X'X [d, d], never the rows themselves, so
memory does not grow with the data. Modules that are given one and the same tensor (query, key and value; gate and up)
share one statistic.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_qst.linear_layers import in_features
from hf_qst.moments import MeanInput, SecondMoment

_BYTES_PER_ENTRY = 8


class CalibrationError(ValueError):
    """The calibration data, or what the model made of it, cannot be used."""


def as_batches(data: Iterable[Mapping], limit: int | None = None, argument: str = "calibration_data") -> list[dict]:
    """The batches as a list that can be read more than once, of at most `limit`.

    Raises:
        CalibrationError: there are none, or one is not a mapping of model inputs.
    """
    batches = list(itertools.islice(data, limit))
    if not batches:
        raise CalibrationError(f"{argument} must hold at least one batch, got none")
    for index, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            raise CalibrationError(
                f"{argument} must hold mappings of model inputs, such as {{'input_ids': tensor}}; batch {index} is "
                f"{type(batch).__name__}"
            )
    batches = [{k: torch.as_tensor(v) if isinstance(v, list) else v for k, v in batch.items()} for batch in batches]
    for index, batch in enumerate(batches):
        if not any(torch.is_tensor(value) and value.numel() for value in batch.values()):
            raise CalibrationError(
                f"{argument}: batch {index} holds no model input (keys: {', '.join(batch) or 'none'})"
            )
    return batches


@contextmanager
def calibration_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module's mode and the random state are as before."""
    modes = {module: module.training for module in model.modules()}
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(sorted(d for d in devices if d is not None)), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in modes.items():
            module.training = training


class CalibrationRun:
    """Runs batches through a model for what its modules see on the way.

    Args:
        model: the model, in any floating dtype or quantised.
        names (*optional*):
            The modules of interest. When all lie in the model's backbone, its head is not run; without names, it is.
    """

    def __init__(self, model: nn.Module, names: Iterable[str] | None = None):
        self.model = model
        self.device = next(model.parameters()).device
        self.runs = model if names is None else self._smallest_part(list(names))
        self.mask: torch.Tensor | None = None
        self.samples = 0

    def _smallest_part(self, names: list[str]) -> nn.Module:
        prefix = getattr(self.model, "base_model_prefix", "")
        backbone = getattr(self.model, prefix, None) if prefix else None
        inside = isinstance(backbone, nn.Module) and all(name.startswith(f"{prefix}.") for name in names)
        return backbone if inside else self.model

    def __call__(self, batch: Mapping):
        """Run one batch and return the output; `rows` then knows which rows of an input are tokens of it.

        Labels are left out: no loss is needed.
        """
        inputs = {k: v.to(self.device) if torch.is_tensor(v) else v for k, v in batch.items() if k != "labels"}
        self.enter(inputs)
        config = getattr(self.model, "config", None)
        if getattr(config, "use_cache", None) is not None:
            inputs.setdefault("use_cache", False)
        return self.runs(**inputs)

    def enter(self, batch: Mapping) -> None:
        """Take the mask and number of samples of this batch."""
        mask = batch.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            raise CalibrationError(
                f"calibration_data: attention_mask must be [batch, seq], got shape {list(mask.shape)}"
            )
        self.mask = None if mask is None else mask.bool().flatten().to(self.device)
        self.samples = next(len(value) for value in batch.values() if torch.is_tensor(value))

    def rows(self, name: str, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows [n, d] of a module's input without padding, each row's sample [n] and its position in the sample [n].

        The leading dimensions may be any, as long as the samples of the batch come one after another.
        """
        rows = inputs.detach().flatten(0, -2)
        if len(rows) % self.samples or (self.mask is not None and len(self.mask) != len(rows)):
            wanted = f"{self.samples} samples" if self.mask is None else f"a mask of {len(self.mask)} tokens"
            raise CalibrationError(
                f"module {name!r} sees {len(rows)} rows, which does not fit a batch of {wanted}: no calibration"
            )
        each = len(rows) // self.samples
        index = torch.arange(len(rows), device=rows.device)
        sample, position = index // each, index % each
        if self.mask is None:
            return rows, sample, position
        kept = self.mask.to(rows.device)
        return rows[kept], sample[kept], position[kept]


@contextmanager
def hooks(handles: Iterable) -> Iterator[None]:
    """Removes the hooks behind these handles at the end, whatever happens."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_groups(model: nn.Module, names: Sequence[str], batch: Mapping) -> list[tuple[str, ...]]:
    """The named modules in the order in which they run, together when they are given one and the same tensor.

    Raises:
        CalibrationError: a module is not reached when `batch` runs.
    """
    found: list[tuple[weakref.ref, list[str]]] = []

    def note(name: str) -> Callable:
        def hook(module, args, output):
            if any(name in members for _, members in found):
                return
            for tensor, members in found:
                if tensor() is args[0]:
                    members.append(name)
                    return
            found.append((weakref.ref(args[0]), [name]))

        return hook

    with calibration_mode(model), hooks(model.get_submodule(n).register_forward_hook(note(n)) for n in names):
        CalibrationRun(model, names)(batch)
    missing = set(names) - {name for _, members in found for name in members}
    if missing:
        raise CalibrationError(
            f"module {min(missing)!r} is not reached by calibration_data ({len(missing)} such modules)"
        )
    return [tuple(members) for _, members in found]


STATISTICS = ("second_moment", "normalized", "representative")


def plan_passes(
    model: nn.Module,
    groups: Sequence[Sequence[str]],
    kind: str = "second_moment",
    memory_limit: int | None = None,
) -> list[list[tuple[str, ...]]]:
    """Which groups' statistics to collect together, so that they take at most `memory_limit` bytes at a time.

    Args:
        groups: names of modules that share an input, as `input_groups` finds them.
        kind (`str`): as of `collect_statistics`; with `"normalized"` every module is a group of its own.
        memory_limit (`int`, *optional*): bytes.

    Raises:
        CalibrationError: one group alone needs more than `memory_limit`.
    """
    if kind == "normalized":
        groups = [(name,) for group in groups for name in group]
    passes, used = [], 0
    for group in map(tuple, groups):
        size = in_features(model.get_submodule(group[0]))
        need = _BYTES_PER_ENTRY * size * size
        if memory_limit is not None and need > memory_limit:
            raise CalibrationError(
                f"memory_limit must be at least {need} bytes for the statistics of module {group[0]!r} "
                f"({size} x {size} in float64), got {memory_limit}"
            )
        if not passes or (memory_limit is not None and used + need > memory_limit):
            passes.append([])
            used = 0
        passes[-1].append(group)
        used += need
    return passes


def collect_statistics(
    model: nn.Module,
    groups: Sequence[tuple[str, ...]],
    batches: Sequence[Mapping],
    kind: str = "second_moment",
    progress: bool = True,
    label: str = "calibration",
) -> dict[tuple[str, ...], SecondMoment | MeanInput]:
    """Input statistics of groups of modules, in one pass over the batches.

    Args:
        model: the model; its weights, mode, hooks and the random state are left as they are.
        groups: names of modules that share an input, as `plan_passes` gives them.
        batches: model inputs; padding by `attention_mask` [batch, seq] is left out.
        kind (`str`):
            `"second_moment"`; `"normalized"`, where every sample's rows are divided by the norm of the module's output
            for that sample without bias, ||X_i W||; or `"representative"`, the mean input of each position.
        progress (`bool`), label (`str`): whether to show a progress bar, and its text.

    Raises:
        CalibrationError: a module's inputs are not finite, or a module is not reached.
    """
    create = MeanInput if kind == "representative" else SecondMoment
    statistics: dict[tuple[str, ...], SecondMoment | MeanInput] = {}
    run = CalibrationRun(model, [group[0] for group in groups])

    def collect(group: tuple[str, ...]) -> Callable:
        def hook(module, args, output):
            rows, sample, position = run.rows(group[0], args[0])
            statistic = statistics.get(group)
            if statistic is None:
                statistic = statistics[group] = create(in_features(module), rows.device)
            if kind == "representative":
                statistic.add(rows, position)
            elif kind == "normalized":
                out, _, _ = run.rows(group[0], output if module.bias is None else output - module.bias)
                statistic.add(_normalized(rows, out, sample, run.samples))
            else:
                statistic.add(rows)
            if not statistic.is_finite():
                raise CalibrationError(f"the inputs of module {group[0]!r} hold NaN or infinite values")

        return hook

    handles = [model.get_submodule(group[0]).register_forward_hook(collect(group)) for group in groups]
    with hooks(handles), calibration_mode(model):
        for batch in tqdm(batches, desc=label, unit="batch", disable=not progress):
            run(batch)
    for group in groups:
        if group not in statistics or statistics[group].count == 0:
            raise CalibrationError(f"module {group[0]!r} sees no rows of calibration_data")
    return statistics


def _normalized(rows: torch.Tensor, out: torch.Tensor, sample: torch.Tensor, samples: int) -> torch.Tensor:
    """Rows divided by the norm of their sample's output; samples without any output count for nothing."""
    energy = torch.zeros(samples, dtype=torch.float64, device=rows.device)
    energy.index_add_(0, sample, out.double().square().sum(1))
    scale = torch.where(energy > 0, energy, torch.inf).rsqrt()
    return rows.double() * scale[sample, None]
