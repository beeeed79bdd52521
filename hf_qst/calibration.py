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

# Rows that are widened to the accumulator's precision at a time.
_CHUNK_ROWS = 4096
_BYTES_PER_ENTRY = 8


class CalibrationError(ValueError):
    """The calibration data, or what the model made of it, cannot be used."""


class SecondMoment:
    """Streaming first, second and fourth moments of rows [n, d], accumulated in float64.

    Products are taken in float64 on CPU. On a GPU they are taken in float32 without TF32, a few thousand rows at a
    time, and added up in float64: as exact as compensated float32 sums, and of the same size.
    """

    def __init__(self, size: int, device: torch.device):
        self.count = 0
        self.sum = torch.zeros(size, dtype=torch.float64, device=device)
        self.products = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.fourth = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, rows: torch.Tensor) -> None:
        """rows: [n, d], of any floating dtype."""
        self.count += rows.shape[0]
        with _exact_products(rows.device):
            for part in rows.detach().split(_CHUNK_ROWS):
                part = part.to(_product_dtype(part))
                self.sum += part.sum(0)
                self.products += part.T @ part
                self.fourth += part.double().square().sum(1).square().sum()

    def is_finite(self) -> bool:
        """Whether every row added was; NaN and infinity stay in the sum of fourth powers."""
        return bool(torch.isfinite(self.fourth))

    def second_moment(self) -> torch.Tensor:
        """E[x'x] [d, d] of rows x, uncentred."""
        return self.products / self.count

    def mean_and_covariance(self) -> tuple[torch.Tensor, torch.Tensor]:
        """E[x] [d] and the centred second moment [d, d]."""
        mean = self.sum / self.count
        return mean, self.second_moment() - torch.outer(mean, mean)

    def ledoit_wolf(self) -> float:
        """How much of the second moment to replace by its mean diagonal, in [0, 1].

        The intensity that minimises the expected squared error of `shrunk` for independent rows (Ledoit and Wolf, "A
        well-conditioned estimator for large-dimensional covariance matrices", 2004), for the uncentred moment.
        """
        moment = self.second_moment()
        size = moment.shape[0]
        spread = (moment - torch.eye(size, dtype=moment.dtype, device=moment.device) * moment.trace() / size).square()
        distance = spread.sum().item()
        if distance == 0.0:
            return 1.0
        noise = (self.fourth / self.count - moment.square().sum()).item() / self.count
        return min(max(noise / distance, 0.0), 1.0)

    def shrunk(self, intensity: float) -> torch.Tensor:
        """`(1 - intensity) C + intensity tr(C)/d I` for the second moment C [d, d]."""
        moment = (1.0 - intensity) * self.second_moment()
        moment.diagonal().add_(intensity * self.products.trace() / (self.count * moment.shape[0]))
        return moment


class CrossMoment(SecondMoment):
    """Second moment of rows Z [n, d] together with their products Z'X [d, d] with other rows X [n, d]."""

    def __init__(self, size: int, device: torch.device):
        super().__init__(size, device)
        self.cross = torch.zeros_like(self.products)

    def add_pair(self, rows: torch.Tensor, others: torch.Tensor) -> None:
        self.add(rows)
        with _exact_products(rows.device):
            for part, other in zip(rows.split(_CHUNK_ROWS), others.split(_CHUNK_ROWS), strict=True):
                self.cross += part.to(_product_dtype(part)).T @ other.to(_product_dtype(other))


class MeanInput:
    """Streaming mean input of each position [positions, d] over samples: the "representative input".

    Kept for comparison with `SecondMoment`: it averages the samples before the products are taken, so what differs
    between samples is lost.
    """

    def __init__(self, size: int, device: torch.device):
        self.count = 0
        self.sums = torch.zeros(0, size, dtype=torch.float64, device=device)
        self.counts = torch.zeros(0, dtype=torch.float64, device=device)

    def add(self, rows: torch.Tensor, positions: torch.Tensor) -> None:
        """rows: [n, d]; positions: [n], each row's place in its sample."""
        self.count += rows.shape[0]
        missing = int(positions.max()) + 1 - len(self.counts) if len(positions) else 0
        if missing > 0:
            self.sums = nn.functional.pad(self.sums, (0, 0, 0, missing))
            self.counts = nn.functional.pad(self.counts, (0, missing))
        self.sums.index_add_(0, positions, rows.double())
        self.counts.index_add_(0, positions, torch.ones_like(positions, dtype=torch.float64))

    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.sums).all())

    def second_moment(self) -> torch.Tensor:
        """Second moment [d, d] of the mean input; of rank at most the number of positions."""
        seen = self.counts > 0
        mean = self.sums[seen] / self.counts[seen, None]
        return mean.T @ mean / len(mean)


def _product_dtype(rows: torch.Tensor) -> torch.dtype:
    return torch.float64 if rows.device.type == "cpu" else torch.float32


@contextmanager
def _exact_products(device: torch.device) -> Iterator[None]:
    """No autocast and no TF32: both round the inputs of a product to fewer bits."""
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)


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
        names: the modules of interest. When all lie in the model's backbone, its head is not run.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]):
        self.model = model
        self.device = next(model.parameters()).device
        self.runs = self._smallest_part(list(names))
        self.mask: torch.Tensor | None = None
        self.samples = 0

    def _smallest_part(self, names: list[str]) -> nn.Module:
        prefix = getattr(self.model, "base_model_prefix", "")
        backbone = getattr(self.model, prefix, None) if prefix else None
        inside = isinstance(backbone, nn.Module) and all(name.startswith(f"{prefix}.") for name in names)
        return backbone if inside else self.model

    def __call__(self, batch: Mapping) -> None:
        """Run one batch; `rows` then knows which rows of an input are tokens of it.

        Labels are left out: no loss is needed.
        """
        inputs = {k: v.to(self.device) if torch.is_tensor(v) else v for k, v in batch.items() if k != "labels"}
        self.enter(inputs)
        config = getattr(self.model, "config", None)
        if getattr(config, "use_cache", None) is not None:
            inputs.setdefault("use_cache", False)
        self.runs(**inputs)

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


def in_features(module: nn.Module) -> int:
    """Input width of a linear layer, also of a `Conv1D` of GPT-2."""
    return module.in_features if hasattr(module, "in_features") else module.nx
