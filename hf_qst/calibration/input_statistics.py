"""Input statistics of a model's modules, from one streaming pass over a few batches.

A module's inputs X [rows, d] are reduced to moments such as X'X [d, d], so memory does not grow with the data. Modules
with the same input tensor (query, key and value; gate and up) share one statistic.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_qst.base_model.experts import enclosing_experts
from hf_qst.base_model.linear_layers import in_features
from hf_qst.calibration.data import CalibrationError
from hf_qst.calibration.moments import MeanInput, SecondMoment
from hf_qst.calibration.passes import CalibrationRun, calibration_mode, first_input, hooks

_BYTES_PER_ENTRY = 8


def input_groups(
    model: nn.Module,
    names: Sequence[str],
    batches: Mapping | Sequence[Mapping],
    run: CalibrationRun | None = None,
) -> list[tuple[str, ...]]:
    """The named modules in the order in which they run; modules with the same input tensor form a group.

    Args:
        batches: one batch or several. The first that reaches all modules decides, because not every batch of a multimodal
            model has images.
        run (*optional*): of the model for these modules, prepared.

    Raises:
        CalibrationError: no batch reaches all modules.
    """
    unreached: set[str] = set(names)
    batches = [batches] if isinstance(batches, Mapping) else batches
    if run is None:
        run = CalibrationRun(model, names)
        with calibration_mode(model):
            run.choose_part(batches[0])
    for batch in batches:
        inputs = run.enter(batch)
        trial = run.first_sample(inputs)
        for tried in (inputs,) if trial is inputs else (trial, inputs):
            groups = _groups_of(model, names, lambda tried=tried: run.run_inputs(tried))
            left = set(names).difference(*groups)
            if not left:
                return groups
        unreached &= left
    left = unreached or left
    raise CalibrationError(
        f"module {min(left)!r} is not reached by calibration_data ({len(left)} such modules); leave it out, or give batches "
        "that reach it"
    )


def _groups_of(model: nn.Module, names: Sequence[str], run: Callable[[], object]) -> list[tuple[str, ...]]:
    """The groups of the modules that a run reaches."""
    groups: list[tuple[weakref.ref, list[str]]] = []

    def note(name: str) -> Callable:
        def hook(module, args, kwargs, output):
            tensor = first_input(args, kwargs)
            if any(name in members for _, members in groups):
                return
            for reference, members in groups:
                if reference() is tensor:
                    members.append(name)
                    return
            groups.append((weakref.ref(tensor), [name]))

        return hook

    handles = [model.get_submodule(name).register_forward_hook(note(name), with_kwargs=True) for name in names]
    with hooks(handles), calibration_mode(model):
        run()
    return [tuple(members) for _, members in groups]


STATISTICS = ("second_moment", "normalized", "representative")


def plan_passes(
    model: nn.Module,
    groups: Sequence[Sequence[str]],
    kind: str = "second_moment",
    memory_limit: int | None = None,
) -> list[list[tuple[str, ...]]]:
    """Groups to collect in each pass, so that their statistics take at most `memory_limit` bytes at a time.

    Args:
        groups: names of modules that share an input, from `input_groups`.
        kind (`str`): see `collect_statistics`; with `"normalized"` every module is a group of its own.
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
    states: Callable[..., Sequence[torch.Tensor]] | None = None,
    run: CalibrationRun | None = None,
    rows_per_dimension: int | None = None,
    least_rows: int = 0,
    forward: Callable | None = None,
) -> dict[tuple[str, ...], SecondMoment | MeanInput]:
    """Input statistics of groups of modules, in one pass over the batches.

    Args:
        model: its weights, modes, hooks and the random state do not change.
        groups: names of modules that share an input, from `plan_passes`.
        batches: model inputs. Padding is excluded by the mask of a module's own sequence: `attention_mask`, an
            encoder-decoder's `decoder_attention_mask`, or -100 in its `labels`.
        kind (`str`):
            `"second_moment"`; `"normalized"`: every sample's rows are divided by the norm of the module's output for that
            sample without bias, ||X_i W||; or `"representative"`: the mean input of each position.
        progress (`bool`), label (`str`): whether to show a progress bar, and its text.
        states (`Callable`, *optional*): for `"second_moment"`; `states(module, args, kwargs, output)` returns the tensors
            [..., d] of one call to collect. By default that is the module's input.
        run (*optional*): of the model, prepared for these batches and modules.
        rows_per_dimension (`int`, *optional*):
            Stop after the batch with which every module has seen so many rows for each dimension of its input.
        least_rows (`int`): and not before every module has seen so many.
        forward (`Callable`, *optional*):
            Runs one of `batches`, which may then be of any kind, in the mode that it sets; by default `run` in evaluation mode.

    Raises:
        CalibrationError: values are not finite, or a module is not reached.
    """
    create = MeanInput if kind == "representative" else SecondMoment
    statistics: dict[tuple[str, ...], SecondMoment | MeanInput] = {}
    if run is None:
        run = CalibrationRun(model, [group[0] for group in groups])
        run.prepare(batches)

    def collect(group: tuple[str, ...]) -> Callable:
        def hook(module, args, kwargs, output):
            tensors = [first_input(args, kwargs)] if states is None else states(module, args, kwargs, output)
            for tensor in tensors:
                rows, sample, position = run.rows(group[0], tensor)
                if sample is None and kind != "second_moment":
                    raise CalibrationError(
                        f"module {group[0]!r} sees rows of which it is not known to which sample of calibration_data they "
                        f"belong; metric {kind!r} needs that"
                    )
                if group not in statistics:
                    statistics[group] = create(rows.shape[-1], rows.device)
                if kind == "representative":
                    statistics[group].add(rows, position)
                elif kind == "normalized":
                    out, _, _ = run.rows(group[0], output if module.bias is None else output - module.bias)
                    statistics[group].add(_normalized(rows, out, sample))
                else:
                    statistics[group].add(rows)
            if not statistics[group].is_finite():
                values = "inputs" if states is None else "states"
                raise CalibrationError(f"the {values} of module {group[0]!r} hold NaN or infinite values")

        return hook

    handles = [
        model.get_submodule(group[0]).register_forward_hook(collect(group), with_kwargs=True) for group in groups
    ]
    with hooks(handles), calibration_mode(model) if forward is None else nullcontext():
        for batch in tqdm(batches, desc=label, unit="batch", disable=not progress):
            run(batch) if forward is None else forward(batch)
            seen = [statistics.get(group) for group in groups]
            if rows_per_dimension and all(_has_rows(one, rows_per_dimension, least_rows) for one in seen):
                break
    for group in groups:
        unseen = group not in statistics or (
            statistics[group].count == 0 and enclosing_experts(model, group[0]) is None
        )
        if unseen:
            raise CalibrationError(f"module {group[0]!r} sees no rows of calibration_data")
    return statistics


def _has_rows(statistic: SecondMoment | MeanInput | None, per_dimension: int, least: int) -> bool:
    return statistic is not None and statistic.count >= max(least, per_dimension * statistic.size)


def _normalized(rows: torch.Tensor, out: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """Rows divided by the norm of their sample's output; 0 for samples with zero output."""
    if not len(rows):
        return rows.double()
    energy = torch.zeros(int(sample.max()) + 1, dtype=torch.float64, device=rows.device)
    energy.index_add_(0, sample, out.double().square().sum(1))
    scale = torch.where(energy > 0, energy, torch.inf).rsqrt()
    return rows.double() * scale[sample, None]
