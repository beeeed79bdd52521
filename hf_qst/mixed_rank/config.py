"""The configuration of mixed-rank compression."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig

from hf_qst import manifest
from hf_qst.mixed_rank.allocation import ALLOCATORS
from hf_qst.mixed_rank.compensation import COMPENSATIONS
from hf_qst.mixed_rank.decomposition import METRICS
from hf_qst.registration import HfQstPeftType

BUDGET_SCOPES = ("targets", "model")
MODES = ("replace", "residual")
_RUNTIME_ONLY = ("calibration_data", "reference_model")


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclass
class MixedRankConfig(PeftConfig):
    """Configuration of activation-aware mixed-rank compression.

    Every target's weight is replaced by two factors with a rank of its own, chosen under one budget of parameters, so
    that what the layer gives for the calibration data changes least. Azizi, Nazemi and Pedram, "Memory-Efficient Vision
    Transformers: An Activation-Aware Mixed-Rank Compression Strategy", arXiv 2402.06004; the defaults are closed forms
    where the paper searches.

    Args:
        keep_ratio (`float`): the part of the parameters to keep, in (0, 1].
        budget_scope (`str`): what it is a part of: `"targets"` (the targets' weights) or `"model"` (all parameters).
        mode (`str`):
            `"replace"` puts factors in the place of dense weights; `"residual"` adds factors to layers that are
            compressed already (quantised or pruned), for what these have lost against `reference_model`.
        reference_model (`nn.Module`, *optional*):
            The dense model of mode `"residual"`, with the same layers. Not saved.
        residual_rank (`int`):
            Mean rank of mode `"residual"`, which has no use for `keep_ratio`: the budget is what this rank would take
            in every layer.
        target_modules (`list[str]` or `str`, *optional*):
            Layers to compress: names or their endings, a regular expression of full names, or `"all-linear"` (also
            None): every linear layer inside the transformer blocks.
        exclude_modules (`list[str]` or `str`, *optional*): layers to leave out, named in the same ways.
        calibration_data (iterable of mappings, *optional*):
            Model inputs, `attention_mask` included where there is padding. Read once, not saved. Without it the plain
            SVD is used, with a warning, or an error if a metric that needs data was asked for.
        max_calibration_batches (`int`, *optional*): how many of them to use.
        metric (`str`):
            How a layer's error is measured: `"second_moment"` (on the calibration data), `"normalized"` (the same with
            every sample divided by its output's norm), `"representative"` (on the mean sample, for comparison),
            `"diagonal"` (per input channel, as ASVD does), `"plain"` (the weight itself), `"auto"` (the first, or the
            last when there is no data).
        shrinkage (`str` or `float`, *optional*):
            What part of the second moment its mean diagonal replaces: `"ledoit_wolf"`, a float in [0, 1], or None.
        shrinkage_scale (`float`): multiplies the Ledoit-Wolf estimate.
        allocator (`str`): `"hull"`, `"gradual"` or `"uniform"`; see `hf_qst.mixed_rank.allocation`.
        rank_multiple (`int` or `str`):
            Ranks are multiples of it: an int, or `"auto"`: 8, and 1 when a target is narrower than 256.
        min_rank_ratio (`float`): no rank falls below this part of the uniform one, in [0, 1].
        allow_dense (`bool`): whether a layer may stay dense.
        compensation (`str`):
            `"lstsq"` (closed form, layer after layer), `"gradient"` (the paper's second pair of factors, folded in),
            `"none"`, or `"auto"` (the first for the metric `"second_moment"`, else none).
        compensation_ridge (`float`): least shrinkage of `"lstsq"`.
        residual_ratio (`float`): part of each rank that `"gradient"` gives to the second pair.
        compensation_steps (`int`), compensation_lr (`float`): of `"gradient"`.
        memory_limit (`int`, *optional*): bytes the input statistics may take at once; more passes are made instead.
        seed (`int`): of the random start of `"gradient"`.
        modules_to_save (`list[str]`, *optional*): further modules to train in full and to save.
        progress (`bool`): whether to show progress bars.
        rank_pattern (`dict[str, int]`):
            Ranks by layer, named as in `target_modules`; 0 keeps a layer dense. The budget is shared by the others. Of
            a compressed model: the rank of every compressed layer, by its full name.
        dense_modules (`list[str]`): filled in: the targets that stayed dense.
        statistics (`dict`): filled in: per layer the relative output error of its rank and the shrinkage.
        manifest (`dict`, *optional*): filled in on saving: names, shapes, dtypes and checksums of the tensors.
    """

    keep_ratio: float = field(default=0.4, metadata={"help": "The part of the parameters to keep."})
    mode: str = field(default="replace", metadata={"help": "'replace' or 'residual'."})
    reference_model: Any = field(default=None, repr=False, compare=False, metadata={"help": "Dense model; not saved."})
    residual_rank: int = field(default=32, metadata={"help": "Mean rank of mode 'residual'."})
    budget_scope: str = field(default="targets", metadata={"help": "'targets' or 'model'."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers to compress."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers to leave out."})
    calibration_data: Iterable[Mapping] | None = field(
        default=None, repr=False, compare=False, metadata={"help": "A few batches of model inputs; not saved."}
    )
    max_calibration_batches: int | None = field(default=None, metadata={"help": "How many batches to use."})
    metric: str = field(default="auto", metadata={"help": "How a layer's error is measured."})
    shrinkage: str | float | None = field(default="ledoit_wolf", metadata={"help": "Shrinkage of the second moment."})
    shrinkage_scale: float = field(default=1.0, metadata={"help": "Multiplies the Ledoit-Wolf estimate."})
    allocator: str = field(default="hull", metadata={"help": "How ranks are chosen."})
    rank_multiple: int | str = field(default="auto", metadata={"help": "Ranks are multiples of it."})
    min_rank_ratio: float = field(default=0.5, metadata={"help": "Least rank, as a part of the uniform one."})
    allow_dense: bool = field(default=True, metadata={"help": "Whether a layer may stay dense."})
    compensation: str = field(default="auto", metadata={"help": "How later layers make up for earlier ones."})
    compensation_ridge: float = field(default=1e-4, metadata={"help": "Least shrinkage of 'lstsq'."})
    residual_ratio: float = field(default=0.1, metadata={"help": "Rank of the second pair of 'gradient'."})
    compensation_steps: int = field(default=300, metadata={"help": "Steps of 'gradient'."})
    compensation_lr: float = field(default=1e-3, metadata={"help": "Learning rate of 'gradient'."})
    memory_limit: int | None = field(default=None, metadata={"help": "Bytes for input statistics."})
    seed: int = field(default=0, metadata={"help": "Seed of 'gradient'."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train in full."})
    progress: bool = field(default=True, metadata={"help": "Whether to show progress bars."})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Ranks by layer."})
    dense_modules: list[str] = field(default_factory=list, metadata={"help": "Targets that stayed dense."})
    statistics: dict[str, Any] = field(default_factory=dict, metadata={"help": "Error and shrinkage by layer."})
    manifest: dict | None = field(default=None, repr=False, metadata={"help": "Names and checksums of the tensors."})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = HfQstPeftType.MIXED_RANK
        self._require("keep_ratio", _is_number(self.keep_ratio) and 0 < self.keep_ratio <= 1, "in (0, 1]")
        for name, accepted in (
            ("mode", MODES),
            ("budget_scope", BUDGET_SCOPES),
            ("metric", ("auto", *METRICS)),
            ("allocator", ALLOCATORS),
            ("compensation", ("auto", *COMPENSATIONS)),
        ):
            self._require(name, getattr(self, name) in accepted, f"one of {', '.join(accepted)}")
        share = self.shrinkage in (None, "ledoit_wolf") or (_is_number(self.shrinkage) and 0 <= self.shrinkage <= 1)
        self._require("shrinkage", share, "'ledoit_wolf', a number in [0, 1], or None")
        self._require("shrinkage_scale", _is_number(self.shrinkage_scale) and self.shrinkage_scale >= 0, "at least 0")
        multiple = self.rank_multiple == "auto" or _is_count(self.rank_multiple)
        self._require("rank_multiple", multiple, "a positive integer or 'auto'")
        for name in ("min_rank_ratio", "residual_ratio"):
            value = getattr(self, name)
            self._require(name, _is_number(value) and 0 <= value <= 1, "in [0, 1]")
        ridge = _is_number(self.compensation_ridge) and 0 <= self.compensation_ridge <= 1
        self._require("compensation_ridge", ridge, "in [0, 1]")
        self._require("compensation_steps", _is_count(self.compensation_steps), "a positive integer")
        self._require("compensation_lr", _is_number(self.compensation_lr) and self.compensation_lr > 0, "positive")
        self._require("seed", _is_count(self.seed, 0), "a non-negative integer")
        for name in ("max_calibration_batches", "memory_limit"):
            value = getattr(self, name)
            self._require(name, value is None or _is_count(value), "a positive integer or None")
        self._require("residual_rank", _is_count(self.residual_rank), "a positive integer")
        for name in ("allow_dense", "progress"):
            self._require(name, isinstance(getattr(self, name), bool), "True or False")
        ranks = isinstance(self.rank_pattern, dict) and all(
            isinstance(k, str) and _is_count(v, 0) for k, v in self.rank_pattern.items()
        )
        self._require("rank_pattern", ranks, "a dict of layer names and ranks (0: dense)")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            names = isinstance(value, (list, tuple, set)) and all(isinstance(n, str) for n in value)
            self._require(name, value is None or isinstance(value, str) or names, "names, a regular expression or None")
            if isinstance(value, set):
                setattr(self, name, sorted(value))
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.mode == "residual" and self.compensation == "gradient":
            raise ValueError("MixedRankConfig.mode='residual' goes with compensation 'lstsq' or 'none', got 'gradient'")
        if self.mode != "residual" and self.reference_model is not None:
            raise ValueError(f"MixedRankConfig.reference_model is only used by mode='residual', got mode={self.mode!r}")
        if self.compensation in ("lstsq", "gradient") and self.metric not in ("auto", "second_moment"):
            raise ValueError(
                f"MixedRankConfig.compensation={self.compensation!r} measures errors by the second moment and needs "
                f"metric='second_moment', got metric={self.metric!r}"
            )

    def _require(self, name: str, holds: bool, accepted: str) -> None:
        if not holds:
            raise ValueError(f"MixedRankConfig.{name} must be {accepted}, got {getattr(self, name)!r}")

    def to_dict(self) -> dict:
        """The configuration as JSON-ready data, without `calibration_data`."""
        # asdict() deep-copies every field, so the batches are set aside first.
        kept = {name: getattr(self, name) for name in _RUNTIME_ONLY}
        for name in _RUNTIME_ONLY:
            setattr(self, name, None)
        try:
            values = super().to_dict()
        finally:
            for name, value in kept.items():
                setattr(self, name, value)
        return {name: value for name, value in values.items() if name not in _RUNTIME_ONLY}

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Save the configuration with the manifest of the weights; see `hf_qst.manifest`."""
        os.makedirs(save_directory, exist_ok=True)
        loaded = self.manifest
        self.manifest = manifest.for_directory(self, save_directory) or loaded
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.manifest = loaded
