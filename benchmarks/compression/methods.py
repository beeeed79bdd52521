"""What the compression benchmark compares: every method is a setting of one configuration, at one number of parameters."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.common.measure import peak_rss, settle_rss
from hf_qst.mixed_rank import LowRankLinear, MixedRankConfig, compress_model

UNIFORM = {"allocation": "uniform", "compensation": "none"}
# How far a model's parameters may be from the budget, as a part of it.
TOLERANCE = 0.005


@dataclass(frozen=True)
class Method:
    """One row of the tables: its label, what it changes in `MixedRankConfig`, and whether it is somebody else's."""

    label: str
    settings: Mapping
    baseline: bool = False


METHODS = {
    "svd": Method("plain SVD, uniform", {"decomposition": "plain", **UNIFORM}, True),
    "asvd": Method("ASVD-style, uniform", {"decomposition": "diagonal", **UNIFORM}, True),
    "svd-llm": Method(
        "SVD-LLM-style, uniform", {"decomposition": {"metric": "second_moment", "shrinkage": None}, **UNIFORM}, True
    ),
    "mix": Method("mixed ranks", {"compensation": "none"}),
    "mix-gradual": Method("mixed ranks, gradual search", {"allocation": "gradual", "compensation": "none"}),
    "mix-gradient": Method("mixed ranks + gradient", {"compensation": "gradient"}),
    "uniform-lstsq": Method("uniform ranks + lstsq", {"allocator": "uniform", "compensation": "lstsq"}),
    "mix-lstsq": Method("mixed ranks + lstsq (default)", {}),
    "mix-fisher": Method("mixed ranks by Fisher weights + lstsq", {"allocation": {"layer_weight": "fisher"}}),
    "mix-kd": Method("mixed ranks + distillation", {"compensation": "kd"}),
}
DEFAULT = "mix-lstsq"
# Distilling a language model takes half an hour on a CPU core, for each part kept.
LLM_METHODS = [name for name in METHODS if name != "mix-kd"]
BASELINES = [name for name, method in METHODS.items() if method.baseline]


def config(method: str, keep: float, batches: Sequence[Mapping], **changes) -> MixedRankConfig:
    """The configuration of a method at this part of the targets' weights."""
    return MixedRankConfig(keep_ratio=keep, calibration_data=batches, **{**METHODS[method].settings, **changes})


def parameters(model: nn.Module) -> int:
    """Counted from the tensors, each once."""
    return sum({id(p): p.numel() for p in model.parameters()}.values())


def processor_clock() -> float:
    """Seconds; with one CPU thread those of the processor, which other processes on the core do not lengthen."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def compressed(dense: nn.Module, method: str, keep: float, batches: Sequence[Mapping], **changes):
    """A smaller copy of the model, and what making it took.

    Returns:
        The model, and {parameters, seconds, peak_bytes (resident, above the two copies of the dense model), ranks}.
    """
    model = copy.deepcopy(dense)
    settings = config(method, keep, batches, **changes)
    before = settle_rss()
    start = processor_clock()
    small = compress_model(model, settings)
    seconds = processor_clock() - start
    facts = {"parameters": parameters(small), "seconds": seconds, "peak_bytes": peak_rss() - before}
    return small, facts | {"ranks": ranks(small)}


def ranks(model: nn.Module) -> dict[str, int]:
    """Rank by name of every layer that has factors."""
    return {name: module.rank for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


def budget(parameters: int, targets: int, keep: float) -> int:
    """Parameters of the whole model when `keep` of its targets' weights are left."""
    return parameters - targets + int(keep * targets)


def off_budget(facts: Mapping, allowed: int) -> float:
    """How far a model is below the budget it was given, as a part of it; negative above."""
    return (allowed - facts["parameters"]) / allowed


def place(keep: float, method: str) -> tuple[float, int]:
    """Where a row stands in a table: by the part kept, then in the order of `METHODS`."""
    return -keep, list(METHODS).index(method)
