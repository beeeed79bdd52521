"""The methods of the compression benchmark: every method is a setting of one configuration, at one number of parameters."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from benchmarks.common.measure import peak_rss, settle_rss
from benchmarks.common.timing import processor_clock
from hf_qst import MixedRankConfig, compress_model
from hf_qst.base_model import dense_shape
from hf_qst.mixed_rank import LowRankLinear, find_targets

SAME_WEIGHTS = {"layer_weight": "none"}
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
    "mix": Method("mixed ranks", {"allocation": SAME_WEIGHTS, "compensation": "none"}),
    "mix-gradual": Method(
        "mixed ranks, gradual search", {"allocation": {"allocator": "gradual", **SAME_WEIGHTS}, "compensation": "none"}
    ),
    "mix-gradient": Method("mixed ranks + gradient", {"allocation": SAME_WEIGHTS, "compensation": "gradient"}),
    "uniform-lstsq": Method("uniform ranks + lstsq", {"allocation": "uniform", "compensation": "lstsq"}),
    "mix-lstsq": Method("mixed ranks + lstsq", {"allocation": SAME_WEIGHTS}),
    "mix-fisher": Method("mixed ranks by Fisher weights + lstsq", {"allocation": {"layer_weight": "fisher"}}),
    "mix-default": Method("mixed ranks by Fisher weights of 4,096 tokens + lstsq (default)", {}),
    "mix-kd": Method(
        "mixed ranks + distillation", {"allocation": SAME_WEIGHTS, "compensation": {"method": "kd", "lr": 5e-4}}
    ),
    "default-kd": Method("default + distillation", {"compensation": {"method": "kd"}}),
}
DEFAULT = "mix-default"
# Distilling a language model takes half an hour on a CPU core, for each part kept.
DISTILLED = ("mix-kd", "default-kd")
LLM_METHODS = [name for name in METHODS if name not in DISTILLED]
BASELINES = [name for name, method in METHODS.items() if method.baseline]


def config(method: str, keep: float, batches: Sequence[Mapping]) -> MixedRankConfig:
    """The configuration of a method at this part of the targets' weights."""
    return MixedRankConfig(keep_ratio=keep, calibration_data=batches, progress=False, **METHODS[method].settings)


def parameters(model: nn.Module) -> int:
    """Counted from the tensors, each once."""
    return sum({id(p): p.numel() for p in model.parameters()}.values())


def target_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(d_in, d_out) by name of the layers that may be factorised."""
    return {name: dense_shape(model.get_submodule(name)) for name in find_targets(model, MixedRankConfig())}


def compressed(dense: nn.Module, method: str, keep: float, batches: Sequence[Mapping]) -> tuple[nn.Module, dict]:
    """A smaller copy of the model, and the facts of its row.

    Returns:
        The model, and {parameters, budget, below_budget (a part of the budget), seconds, peak_bytes (resident, above the
        two copies of the dense model), ranks (of the layers that have factors)}.
    """
    model = copy.deepcopy(dense)
    before = settle_rss()
    start = processor_clock()
    small = compress_model(model, config(method, keep, batches))
    facts = {"seconds": processor_clock() - start, "peak_bytes": peak_rss() - before, "parameters": parameters(small)}
    targets = sum(d_in * d_out for d_in, d_out in target_shapes(dense).values())
    allowed = parameters(dense) - targets + int(keep * targets)
    ranks = {name: module.rank for name, module in small.named_modules() if isinstance(module, LowRankLinear)}
    below = (allowed - facts["parameters"]) / allowed
    return small, {"budget": allowed, "below_budget": below, **facts, "ranks": ranks}


def place(row: Mapping) -> tuple[float, int]:
    """Where a row stands in a table: by the part kept, then in the order of `METHODS`."""
    return -row["keep"], list(METHODS).index(row["method"])
