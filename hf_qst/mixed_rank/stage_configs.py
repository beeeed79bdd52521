"""The settings of each stage, nested in `MixedRankConfig`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from hf_qst.mixed_rank.allocation.allocators import ALLOCATORS
from hf_qst.mixed_rank.compensation.stage import COMPENSATIONS
from hf_qst.mixed_rank.decomposition.metrics import METRICS
from hf_qst.mixed_rank.sensitivity import LAYER_WEIGHTS
from hf_qst.tuner.config import is_count, is_number


class StageConfig:
    """Settings of one stage, which check themselves and name the field of `MixedRankConfig` that holds them."""

    where: ClassVar[str]
    choice: ClassVar[str | None] = None
    """The field that a plain string stands for."""

    @classmethod
    def of(cls, value):
        """The settings as a copy of their own, from themselves, a dict of their fields, or the name of a variant."""
        if isinstance(value, cls):
            return dataclasses.replace(value)
        if cls.choice and isinstance(value, str):
            return cls(**{cls.choice: value})
        if not isinstance(value, Mapping):
            named = f", or a string for {cls.choice}" if cls.choice else ""
            raise ValueError(f"{cls.where} must be a {cls.__name__} or a dict of its fields{named}, got {value!r}")
        names = cls.field_names()
        if unknown := [name for name in value if name not in names]:
            raise TypeError(f"{cls.where} has no field {unknown[0]!r}; it has {', '.join(names)}")
        return cls(**value)

    @classmethod
    def field_names(cls) -> list[str]:
        return [each.name for each in dataclasses.fields(cls)]

    def _require(self, name: str, holds: bool, accepted: str) -> None:
        if not holds:
            raise ValueError(f"{self.where}.{name} must be {accepted}, got {getattr(self, name)!r}")

    def _require_one_of(self, name: str, accepted: tuple[str, ...]) -> None:
        self._require(name, getattr(self, name) in accepted, f"one of {', '.join(accepted)}")

    def _require_share(self, name: str) -> None:
        value = getattr(self, name)
        self._require(name, is_number(value) and 0 <= value <= 1, "in [0, 1]")


@dataclass
class DecompositionConfig(StageConfig):
    """How a layer's error is measured, and so which factors are its best.

    Args:
        metric (`str`):
            `"second_moment"` (on the calibration data), `"normalized"` (the same with every sample divided by its
            output's norm), `"representative"` (on the mean sample, for comparison), `"diagonal"` (per input channel, as
            ASVD does), `"plain"` (the weight itself), `"auto"` (the first, or the last when there is no data).
        shrinkage (`str` or `float`, *optional*):
            What part of the second moment its mean diagonal replaces: `"ledoit_wolf"`, a float in [0, 1], or None.
        shrinkage_scale (`float`): multiplies the Ledoit-Wolf estimate.
        bias_correction (`bool`):
            Leave a layer's mean output to its bias, where it has one, and the deviations from it to the factors.
    """

    where, choice = "MixedRankConfig.decomposition", "metric"

    metric: str = field(default="auto", metadata={"help": "How a layer's error is measured."})
    shrinkage: str | float | None = field(default="ledoit_wolf", metadata={"help": "Shrinkage of the second moment."})
    shrinkage_scale: float = field(default=1.0, metadata={"help": "Multiplies the Ledoit-Wolf estimate."})
    bias_correction: bool = field(default=False, metadata={"help": "Whether biases take the mean output over."})

    def __post_init__(self):
        self._require_one_of("metric", ("auto", *METRICS))
        share = self.shrinkage in (None, "ledoit_wolf") or (is_number(self.shrinkage) and 0 <= self.shrinkage <= 1)
        self._require("shrinkage", share, "'ledoit_wolf', a number in [0, 1], or None")
        self._require("shrinkage_scale", is_number(self.shrinkage_scale) and self.shrinkage_scale >= 0, "at least 0")
        self._require("bias_correction", isinstance(self.bias_correction, bool), "True or False")


@dataclass
class AllocationConfig(StageConfig):
    """How ranks are chosen under the budget.

    Args:
        allocator (`str`):
            `"hull"`, `"gradual"` or `"uniform"`, see `hf_qst.mixed_rank.allocation`; or `"auto"`: whichever of uniform
            ranks and of `"hull"` with `min_rank_ratio` 0.5 and 0 changes the model's predictions least on the last
            quarter of the calibration batches, when made from the others.
        layer_weight (`str`):
            How much a layer's relative error counts: `"none"` (all the same) or `"fisher"` (by the gradient of the
            model's own loss at its output; takes `labels` in the batches, or the tokens of a causal language model, and
            a backward pass). `"auto"` is the second, on 4,096 of the tokens, for a causal language model that reads text,
            and the first otherwise.
        rank_multiple (`int` or `str`):
            Ranks are multiples of it: an int, or `"auto"`: 8, and 1 when a target is narrower than 256; for factors in
            NF4, whose fast kernels want it, 64 when no target is narrower than 1024.
        min_rank_ratio (`float`): no rank falls below this part of the uniform one, in [0, 1].
        allow_dense (`bool`): whether a layer may stay dense.
        min_saving (`float`):
            Part of its parameters, in [0, 1), that a layer's factors have to save; otherwise it stays dense. For speed:
            two narrow products are slower than one wide one when they save little.
    """

    where, choice = "MixedRankConfig.allocation", "allocator"

    allocator: str = field(default="hull", metadata={"help": "How ranks are chosen."})
    layer_weight: str = field(default="auto", metadata={"help": "How much a layer's error counts."})
    rank_multiple: int | str = field(default="auto", metadata={"help": "Ranks are multiples of it."})
    min_rank_ratio: float = field(default=0.5, metadata={"help": "Least rank, as a part of the uniform one."})
    allow_dense: bool = field(default=True, metadata={"help": "Whether a layer may stay dense."})
    min_saving: float = field(default=0.0, metadata={"help": "Part of its parameters that factors have to save."})

    def __post_init__(self):
        self._require_one_of("allocator", (*ALLOCATORS, "auto"))
        self._require_one_of("layer_weight", LAYER_WEIGHTS)
        multiple = self.rank_multiple == "auto" or is_count(self.rank_multiple)
        self._require("rank_multiple", multiple, "a positive integer or 'auto'")
        self._require_share("min_rank_ratio")
        self._require("allow_dense", isinstance(self.allow_dense, bool), "True or False")
        self._require("min_saving", is_number(self.min_saving) and 0 <= self.min_saving < 1, "in [0, 1)")


@dataclass
class CompensationConfig(StageConfig):
    """How factors make up for the errors of the layers before them.

    Args:
        method (`str`):
            `"lstsq"` (closed form, layer after layer), `"gradient"` (the paper's second pair of factors, folded in),
            `"kd"` (the first, then all factors trained together on the dense model's predictions, whose distance is
            that of the model's head; see `hf_qst.mixed_rank.predictions`), `"none"`, or `"auto"` (the first for the
            metric `"second_moment"`, else none).
        ridge (`float`): least shrinkage of `"lstsq"`.
        residual_ratio (`float`): part of each rank that `"gradient"` gives to the second pair.
        steps (`int`, *optional*): most steps of `"gradient"` (300 by default) and `"kd"` (20 passes over the batches).
        lr (`float`, *optional*): learning rate of `"gradient"` (1e-3 by default) and `"kd"` (1e-4).
    """

    where, choice = "MixedRankConfig.compensation", "method"

    method: str = field(default="auto", metadata={"help": "How later layers make up for earlier ones."})
    ridge: float = field(default=1e-4, metadata={"help": "Least shrinkage of 'lstsq'."})
    residual_ratio: float = field(default=0.1, metadata={"help": "Rank of the second pair of 'gradient'."})
    steps: int | None = field(default=None, metadata={"help": "Most steps of 'gradient' and 'kd'."})
    lr: float | None = field(default=None, metadata={"help": "Learning rate of 'gradient' and 'kd'."})

    def __post_init__(self):
        self._require_one_of("method", ("auto", *COMPENSATIONS))
        self._require_share("ridge")
        self._require_share("residual_ratio")
        self._require("steps", self.steps is None or is_count(self.steps), "a positive integer or None")
        self._require("lr", self.lr is None or (is_number(self.lr) and self.lr > 0), "positive or None")


@dataclass
class ResidualConfig(StageConfig):
    """Factors that are added to layers that are compressed already, for what these have lost.

    Args:
        reference_model (`nn.Module`): the dense model, with the same layers. Not saved.
        rank (`int`): mean rank: the budget is what this rank would take in every layer, and `keep_ratio` is not used.
    """

    where = "MixedRankConfig.residual"

    reference_model: Any = field(default=None, repr=False, compare=False, metadata={"help": "Dense model; not saved."})
    rank: int = field(default=32, metadata={"help": "Mean rank."})

    def __post_init__(self):
        self._require("rank", is_count(self.rank), "a positive integer")
