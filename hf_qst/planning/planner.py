"""What a run will take, before it is launched: parameters, bytes, and an estimate of seconds."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from hf_qst.planning import communication, traced_run
from hf_qst.planning.chips import CARDS, GIB, USABLE, Chip, cards_for, chip_of
from hf_qst.planning.model_parts import (
    adapter_file_bytes,
    config_of,
    count_parameters,
    empty_model,
    vocabulary,
    weight_bytes,
    with_head,
)
from hf_qst.planning.simulation import PlanError, Simulation
from hf_qst.planning.table import as_table

FULL = "full"
# Bytes of an optimiser's states for a parameter of n numbers of k bytes. bitsandbytes keeps 8 bits and a scale for 256
# numbers, and small parameters in float32.
OPTIMIZERS: dict[str, Callable[[int, int], float]] = {
    "adamw": lambda n, k: 2 * n * k,
    "adamw_8bit": lambda n, k: 2 * n * (1 + 4 / 256) if n >= 4096 else 8 * n,
    "sgd": lambda n, k: 0,
}
_ROUND = 64  # tokens, to which the longest sequence is rounded down


@dataclass(frozen=True)
class Plan:
    """What a run will take; bytes are plain numbers, seconds are an estimate from the chip's ceilings.

    Attributes:
        model (`str`), method (`str`): the type of the model and what is done with it.
        batch (`int`), sequence (`int`): rows of a batch and tokens of a row.
        device (`str`): the chip.
        options (`dict`): the other arguments of `plan`.
        parameters (`dict[str, int]`): by part, and `"trained"`.
        bytes (`dict[str, int]`): by what they are for, at the moment that takes most.
        kept (`int`): bytes kept for the backward pass at the end of the forward pass.
        kept_peak (`int`): most of these at any time, recomputed blocks included.
        adapter_file (`int`, *optional*): bytes of `adapter_model.safetensors`.
        memory (`int`, *optional*): bytes of the device.
        fits (`dict[str, bool]`): whether the run fits the device and cards of 16, 24, 48 and 80 GB.
        products (`float`): floating-point operations in matrix products.
        seconds (`float`, *optional*): of a step or a prompt; None where the chip's ceilings are not known.
        ceilings (`str`): where these are from.
        largest (`dict[str, dict]`): for the device, or the cards where its size is not known, the largest `"batch"` and
            `"sequence"` that fit; 0: none.
        savings (`dict[str, int]`): bytes that another option would save.
        exchanged (`dict[str, int]`): bytes of the tensors that the processes of a training sum or gather in a step; see
            `communication`.
    """

    model: str
    method: str
    batch: int
    sequence: int
    device: str
    options: dict
    parameters: dict[str, int]
    bytes: dict[str, int]
    kept: int = 0
    kept_peak: int = 0
    adapter_file: int | None = None
    memory: int | None = None
    fits: dict[str, bool] = field(default_factory=dict)
    products: float = 0
    seconds: float | None = None
    ceilings: str = ""
    largest: dict[str, dict[str, int]] = field(default_factory=dict)
    savings: dict[str, int] = field(default_factory=dict)
    exchanged: dict[str, int] = field(default_factory=dict)

    def communication(self, processes: int) -> dict[str, int]:
        """Bytes that each of this many processes receives in a training step, by `"ddp"`, `"zero2"` and `"fsdp2"`.

        The plan is that of each process: `batch` is its own. With gradient accumulation a step is one batch for FSDP2.

        Raises:
            ValueError: there is no training step, or `processes` is less than 1.
        """
        if not isinstance(processes, int) or processes < 1:
            raise ValueError(f"processes must be an integer of at least 1, got {processes!r}")
        if not self.exchanged:
            raise ValueError("the plan is of no training step of a known decoder, in which something is exchanged")
        return communication.received(self.exchanged, processes)

    @property
    def total(self) -> int:
        """Bytes at the moment that takes most."""
        return sum(self.bytes.values())

    def as_dict(self) -> dict:
        """The plan as JSON-ready data."""
        return {**dataclasses.asdict(self), "total": self.total}

    def __str__(self) -> str:
        return as_table(self)


@dataclass(frozen=True)
class Run:
    """The arguments of `plan`, checked."""

    source: object
    method: object
    batch: int
    sequence: int
    chip: Chip
    inference: bool
    gradient_checkpointing: bool
    optimizer: str
    quantization_config: object
    quantize_experts: bool
    dtype: torch.dtype
    autocast: torch.dtype | None = None

    def same_model_as(self, other: Run) -> bool:
        return self.method is other.method and self.gradient_checkpointing == other.gradient_checkpointing

    def changed(self, **changes) -> Run:
        return dataclasses.replace(self, **changes)


def plan(
    model_or_config,
    method=None,
    batch: int = 1,
    sequence: int = 2048,
    device: str | torch.device | None = None,
    *,
    inference: bool = False,
    gradient_checkpointing: bool = False,
    optimizer: str = "adamw",
    quantization_config=None,
    quantize_experts: bool = False,
    dtype: torch.dtype | None = None,
    search: bool = True,
) -> Plan:
    """What a run will take, from a configuration alone: no weights are loaded, nothing is allocated.

    The model's own code runs on tensors without values (`hf_qst.planning.simulation`), so bytes are those of that code and
    not of a formula. See `docs/plan.md` for how far they can be trusted.

    Args:
        model_or_config ([`~transformers.PretrainedConfig`], `str`, or a model):
            A configuration, a folder or hub name with one, or a model. Of a model without adapters only configuration,
            dtype and quantisation count; one that PEFT wraps is planned as it is, with `method=None`.
        method ([`~peft.PeftConfig`] or `"full"`, *optional*):
            The adapter's configuration, of this package or of PEFT (LoRA on a 4-bit base is QLoRA), or `"full"` for all
            parameters. None: the adapters of the model, or with `inference` the bare base.
        batch (`int`), sequence (`int`): rows of a batch, tokens of a row; there is no padding.
        device (`str` or `torch.device`, *optional*):
            `"cpu"`, `"cuda"`, `"cuda:N"`, a chip such as `"h100"`, or a size such as `"24GB"`. By default the one here.
        inference (`bool`): read a prompt into a cache instead of a training step.
        gradient_checkpointing (`bool`): of the base, as `TrainingArguments` has it.
        optimizer (`str`): `"adamw"`, `"adamw_8bit"` or `"sgd"`.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*): by default the configuration's own.
        quantize_experts (`bool`): the experts of a mixture in 4 bits as well, by [`hf_qst.quantize_experts`].
        dtype (`torch.dtype`, *optional*):
            Of the weights; by default the configuration's, or on a CPU float32. With 16 bits the step is one under
            autocast.
        search (`bool`): also look for the largest batch and sequence, and for what other options would save.

    Returns:
        [`Plan`]

    Raises:
        PlanError: code of the model reads values, or the method has no plan for this model.
        ValueError: an argument out of range.
    """
    run = _checked(
        model_or_config, method, batch, sequence, device, inference, gradient_checkpointing, optimizer,
        quantization_config, quantize_experts, dtype,
    )  # fmt: skip
    with _without_warnings():
        planner = Planner(run)
        made = planner.plan()
        return planner.searched(made) if search else made


@contextmanager
def _without_warnings() -> Iterator[None]:
    """What the methods warn of is for the training itself."""
    package = logging.getLogger("hf_qst")
    before = package.level
    package.setLevel(logging.ERROR)
    try:
        yield
    finally:
        package.setLevel(before)


def _checked(
    source, method, batch, sequence, device, inference, checkpointing, optimizer, quantization, experts, dtype
) -> Run:
    for name, value in (("batch", batch), ("sequence", sequence)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
    wrapped = bool(getattr(source, "peft_config", None))
    if wrapped and method is not None:
        raise ValueError(f"method must be None for a model with adapters, got {method!r}")
    if not wrapped and method is None and not inference:
        raise ValueError("method must be a PEFT configuration or 'full', got None; None is for inference=True")
    if wrapped and source.training == inference:
        needed = "evaluation" if inference else "training"
        raise ValueError(
            f"model_or_config must be in {needed} mode for this plan: call model.{'eval' if inference else 'train'}()"
        )
    if not (method is None or method == FULL or isinstance(method, PeftConfig)):
        raise ValueError(f"method must be a PEFT configuration, 'full' or None, got {method!r}")
    chip, config = chip_of(device), config_of(source)
    if dtype is None:
        # A configuration's type is that of its checkpoint; a CPU computes in float32.
        said = isinstance(source, nn.Module) or chip.kernels == "cuda"
        own = getattr(source if isinstance(source, nn.Module) else config, "dtype", None) if said else None
        dtype = own or (torch.float32 if chip.kernels == "cpu" else torch.bfloat16)
    # Trained parts are in float32, and 16-bit weights are trained under autocast.
    autocast = dtype if dtype in (torch.bfloat16, torch.float16) and not inference else None
    return Run(
        source if wrapped else config, method, batch, sequence, chip, inference, checkpointing, optimizer, quantization,
        experts, dtype, autocast,
    )  # fmt: skip


class Planner:
    """Plans of one model under one method, for several sizes of its batches.

    Args:
        run ([`Run`])
        padded (`bool`): whether attention masks hide something.
        limit (`float`): seconds that a run may take to follow.
    """

    def __init__(self, run: Run, padded: bool = False, limit: float = math.inf):
        self.run, self.config, self.limit = run, config_of(run.source), limit
        self.model = _prepared(run)
        self.simulation = Simulation(self.model, run.chip.kernels, padded)
        self.twin = self.simulation.model
        self.exchange = communication.Exchange(self.twin, run.autocast)
        self._runs: dict[tuple[int, int], traced_run.TracedRun] = {}

    def traced(self, batch: int, sequence: int, inputs: Mapping | None = None) -> traced_run.TracedRun:
        """The run on batches of this size, or on `inputs`."""
        key = batch, sequence
        if key not in self._runs:
            ids = torch.empty(batch, sequence, dtype=torch.long, device="meta")
            more = {"logits_to_keep": 1} if self.run.inference else {"labels": ids, "use_cache": False}
            trace = traced_run.prompt if self.run.inference else traced_run.training_step
            try:
                inputs = inputs or {"input_ids": ids, **more}
                self._runs[key] = trace(self.simulation, inputs, vocabulary(self.model), self.run.autocast, self.limit)
            except TimeoutError as error:
                raise PlanError(f"no plan for {type(with_head(self.model)).__name__}: {error}") from error
            except Exception as error:  # of torch, transformers or the model's own code
                raise PlanError(
                    f"no plan for {type(with_head(self.model)).__name__}: its code does not run without values "
                    f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
                ) from error
            self.simulation.forget_gradients()
        return self._runs[key]

    def work(self, batch: int, sequence: int) -> dict[str, int] | None:
        """Bytes of what a method does instead of training steps; None where it trains."""
        count = getattr(self.run.method, "planned_work", None)
        return None if count is None or self.run.inference else count(self.model, batch, sequence)

    def bytes_of(self, batch: int, sequence: int, inputs: Mapping | None = None) -> dict[str, int]:
        """All bytes at the moment that takes most."""
        fixed = weight_bytes(self.twin)
        if (work := self.work(batch, sequence)) is not None:
            return {**fixed, **work}
        traced = self.traced(batch, sequence, inputs)
        if self.run.inference:
            return {**fixed, **traced.at_peak}
        count = OPTIMIZERS[self.run.optimizer]
        trained = [p for p in self.twin.parameters() if p.requires_grad]
        states = {"optimizer": round(sum(count(p.numel(), p.element_size()) for p in trained))}
        at_peak = dict(traced.at_peak)
        if traced.gradients > traced.peak:
            at_peak = {traced_run.GRADIENTS: traced.gradients}  # while the optimiser steps
        return {**fixed, **states, **at_peak}

    def total(self, batch: int, sequence: int) -> int:
        return sum(self.bytes_of(batch, sequence).values())

    def plan(self, inputs: Mapping | None = None, timed: bool = True) -> Plan:
        """The plan, for batches of the run's size or for `inputs`; `timed`: with an estimate of seconds."""
        run, chip = self.run, self.run.chip
        sizes = {kind: size for kind, size in self.bytes_of(run.batch, run.sequence, inputs).items() if size}
        # Nothing is traced where a method counts its work by itself.
        traced = self._runs.get((run.batch, run.sequence), traced_run.TracedRun({}))
        trained = sum(p.numel() for p in self.twin.parameters() if p.requires_grad)
        total = sum(sizes.values())
        return Plan(
            model=self.config.model_type,
            method=method_name(run.method, self.model, run),
            batch=run.batch,
            sequence=run.sequence,
            device=chip.name,
            options=_options(run),
            parameters={**count_parameters(self.twin), "trained": 0 if run.inference else trained},
            bytes=sizes,
            kept=traced.kept,
            kept_peak=traced.kept_peak,
            adapter_file=adapter_file_bytes(self.twin) if isinstance(self.twin, PeftModel) else None,
            memory=chip.memory,
            fits={**({} if chip.usable is None else {chip.name: total <= chip.usable}), **cards_for(total)},
            products=traced.products,
            seconds=chip.with_ceilings().seconds(traced.operations) if timed and traced.operations else None,
            ceilings=chip.with_ceilings().source if timed else "",
            exchanged=self.exchange.bytes() if traced.operations and not run.inference else {},
        )

    def searched(self, made: Plan) -> Plan:
        """The plan with the largest sizes that fit, and what other options would save."""
        run = self.run
        largest = {
            name: {
                "batch": largest_size(lambda n: self.total(n, run.sequence), usable, run.batch),
                "sequence": largest_size(lambda n: self.total(run.batch, n), usable, run.sequence, _ROUND),
            }
            for name, usable in _limits(run.chip).items()
        }
        savings = {}
        for name, other in _other_runs(run).items():
            planner = copy.copy(self) if other.same_model_as(run) else Planner(other)
            planner.run = other
            savings[name] = made.total - planner.total(other.batch, other.sequence)
        positive = {name: saved for name, saved in savings.items() if saved > 0}
        savings = dict(sorted(positive.items(), key=lambda item: -item[1]))
        return dataclasses.replace(made, largest=largest, savings=savings)


def largest_size(total: Callable[[int], int], usable: int, known: int, step: int = 1, tries: int = 8) -> int:
    """The largest multiple of `step` at which `total` is within `usable`, to one part in a hundred; 0 if it never is.

    `total` grows with its argument nearly as a parabola, so it is solved for the one through the three nearest points.
    """
    sizes = {step: total(step)}
    if sizes[step] > usable:
        return 0
    middle = max(known // step * step, 2 * step)
    for size in (middle, 2 * middle):
        sizes[size] = total(size)
    for _ in range(tries):
        low = max(size for size, taken in sizes.items() if taken <= usable)
        above = [size for size, taken in sizes.items() if taken > usable]
        guess = max(low + step, int(_root(sizes, usable)) // step * step)
        if above:
            if min(above) - low <= max(step, low // 100):
                break
            guess = min(guess, min(above) - step)
        sizes[guess] = total(guess)
        if sizes[guess] <= usable and usable - sizes[guess] <= (usable - sizes[step]) // 100:
            break
    return max(size for size, taken in sizes.items() if taken <= usable)


def _root(sizes: Mapping[int, int], usable: int) -> float:
    """Where the parabola through the three points nearest to `usable` reaches it."""
    a, b, c = sorted(sorted(sizes, key=lambda size: abs(sizes[size] - usable))[:3])
    first, second = (sizes[b] - sizes[a]) / (b - a), (sizes[c] - sizes[b]) / (c - b)
    bend = max(0.0, (second - first) / (c - a))
    slope, rest = first - bend * (a + b), sizes[a] - first * a + bend * a * b - usable
    if bend * c < 1e-6 * max(slope, 1.0):
        return -rest / max(slope, 1e-9)
    return (-slope + math.sqrt(max(0.0, slope**2 - 4 * bend * rest))) / (2 * bend)


def _limits(chip: Chip) -> dict[str, int]:
    """Bytes that a run can take on the device, or on all cards where its size is not known: each asks for some ten runs."""
    if chip.usable is not None:
        return {chip.name: chip.usable}
    return {f"{card} GB": int(USABLE * card * GIB) for card in CARDS}


def _prepared(run: Run) -> nn.Module:
    """The model of a run, with its adapter, in the mode that it runs in."""
    if isinstance(run.source, nn.Module):
        return run.source
    method = run.method
    task = getattr(method, "task_type", None)
    model = empty_model(run.source, run.dtype, run.quantization_config, task, run.quantize_experts)
    if method == FULL:
        model.requires_grad_(True)
    elif method is not None:
        model = _wrapped(model, method, run.inference)
    if run.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if isinstance(method, PeftConfig):
            with_head(model).enable_input_require_grads()
    return model.train(not run.inference)


def _wrapped(model: nn.Module, method: PeftConfig, inference: bool) -> nn.Module:
    method = copy.copy(method)
    if getattr(method, "calibration_data", None) is not None:
        method.calibration_data = None  # there are no weights to calibrate
    own = getattr(method, "planned_model", None)
    made = None if own is None else own(model, inference)
    if made is not None:
        return made
    with torch.device("meta"):
        return get_peft_model(model, method)


def _other_runs(run: Run) -> dict[str, Run]:
    """The same run with one option changed, by what a user would write."""
    found = {}
    if run.batch > 1:
        found[f"batch={run.batch // 2}"] = run.changed(batch=run.batch // 2)
    if run.inference or isinstance(run.source, nn.Module):
        return found
    if run.optimizer == "adamw":
        found["optimizer='adamw_8bit'"] = run.changed(optimizer="adamw_8bit")
    options = getattr(run.method, "memory_options", None)
    if options is None and not run.gradient_checkpointing:
        found["gradient_checkpointing=True"] = run.changed(gradient_checkpointing=True)
    for name, value in (options or {}).items():
        if getattr(run.method, name) != value:
            method = copy.copy(run.method)
            setattr(method, name, value)
            found[f"{name}={value!r}"] = run.changed(method=method)
    return found


def method_name(method, model: nn.Module, run: Run) -> str:
    """How a table calls the run."""
    if method is None:
        configs = getattr(model, "peft_config", {})
        name = ", ".join(dict.fromkeys(str(c.peft_type.value) for c in configs.values())) or "base"
    else:
        name = method if isinstance(method, str) else str(method.peft_type.value)
    four_bit = any(getattr(p, "quant_state", None) is not None for p in model.parameters())
    four_bit = four_bit or any(type(p).__name__ == "Params4bit" for p in model.parameters())
    name += " on a 4-bit base" if four_bit else ""
    name += ", checkpointed" if run.gradient_checkpointing else ""
    return f"{name}, inference" if run.inference else name


def _options(run: Run) -> dict:
    return {
        "inference": run.inference,
        "gradient_checkpointing": run.gradient_checkpointing,
        "optimizer": run.optimizer,
        "dtype": str(run.dtype).removeprefix("torch."),
        "autocast": None if run.autocast is None else str(run.autocast).removeprefix("torch."),
    }
