"""The configuration of mixed-rank compression."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from hf_qst.mixed_rank.allocation import ALLOCATORS
from hf_qst.mixed_rank.compensation import COMPENSATIONS
from hf_qst.mixed_rank.decomposition import METRICS
from hf_qst.mixed_rank.quantization import SCHEMES
from hf_qst.mixed_rank.sensitivity import LAYER_WEIGHTS
from hf_qst.tuner.config import BUDGET_SCOPES, MethodConfig, is_count, is_number

MODES = ("replace", "residual")


@dataclass
class MixedRankConfig(MethodConfig):
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
            Model inputs, masks included where there is padding, as tensors, numpy arrays or lists; or the rows of a
            tokenised data set. Every module's rows are masked by the mask of its own sequence. Read once, not saved.
            Without it the plain SVD is used, with a warning, or an error if a metric that needs data was asked for.
        max_calibration_batches (`int`, *optional*): how many of them to use.
        metric (`str`):
            How a layer's error is measured: `"second_moment"` (on the calibration data), `"normalized"` (the same with
            every sample divided by its output's norm), `"representative"` (on the mean sample, for comparison),
            `"diagonal"` (per input channel, as ASVD does), `"plain"` (the weight itself), `"auto"` (the first, or the
            last when there is no data).
        shrinkage (`str` or `float`, *optional*):
            What part of the second moment its mean diagonal replaces: `"ledoit_wolf"`, a float in [0, 1], or None.
        shrinkage_scale (`float`): multiplies the Ledoit-Wolf estimate.
        allocator (`str`):
            `"hull"`, `"gradual"` or `"uniform"`, see `hf_qst.mixed_rank.allocation`; or `"auto"`: whichever of uniform
            ranks and of `"hull"` with `min_rank_ratio` 0.5 and 0 changes the model's predictions least on the last
            quarter of the calibration batches, when made from the others.
        layer_weight (`str`):
            How much a layer's relative error counts: `"none"` (all the same) or `"fisher"` (by the gradient of the
            model's own loss at its output; takes `labels` in the batches, or the tokens of a causal language model, and
            a backward pass).
        rank_multiple (`int` or `str`):
            Ranks are multiples of it: an int, or `"auto"`: 8, and 1 when a target is narrower than 256; for factors in
            NF4, whose fast kernels want it, 64 when no target is narrower than 1024.
        min_rank_ratio (`float`): no rank falls below this part of the uniform one, in [0, 1].
        allow_dense (`bool`): whether a layer may stay dense.
        min_saving (`float`):
            Part of its parameters, in [0, 1), that a layer's factors have to save; otherwise it stays dense. For speed:
            two narrow products are slower than one wide one when they save little.
        compensation (`str`):
            `"lstsq"` (closed form, layer after layer), `"gradient"` (the paper's second pair of factors, folded in),
            `"kd"` (the first, then all factors trained together on the dense model's predictions, whose distance is
            that of the model's head; see `hf_qst.mixed_rank.predictions`), `"none"`, or
            `"auto"` (the first for the metric `"second_moment"`, else none).
        compensation_ridge (`float`): least shrinkage of `"lstsq"`.
        residual_ratio (`float`): part of each rank that `"gradient"` gives to the second pair.
        compensation_steps (`int`, *optional*):
            Most steps of `"gradient"` (300 by default) and `"kd"` (20 passes over the calibration batches).
        compensation_lr (`float`, *optional*): learning rate of `"gradient"` (1e-3 by default) and `"kd"` (1e-4).
        quantize_factors (`str`, *optional*):
            `"nf4"` or `"int8"`: hold the factors so, by bitsandbytes. They do not train any more.
        bias_correction (`bool`):
            Leave a layer's mean output to its bias, where it has one, and the deviations from it to the factors.
        memory_limit (`int`, *optional*): bytes the input statistics may take at once; more passes are made instead.
        init_weights (`bool`): False starts at random factors of the chosen ranks, for tests and experiments.
        keep_base_weights (`bool`):
            Keep the dense weights beside the factors, so that adapters can be added, switched, disabled, merged,
            unmerged, deleted and unloaded as those of PEFT's own methods. Residuals always do.
        seed (`int`): of the random start of `"gradient"` and the order of batches in `"kd"`.
        modules_to_save (`list[str]`, *optional*): further modules to train in full and to save.
        progress (`bool`): whether to show progress bars.
        rank_pattern (`dict[str, int]`):
            Ranks by layer, named as in `target_modules`; 0 keeps a layer dense. The budget is shared by the others. Of
            a compressed model: the rank of every compressed layer, by its full name.
        dense_modules (`list[str]`): filled in: the targets that stayed dense.
        statistics (`dict`): filled in: per layer the relative output error of its rank and the shrinkage.
        allocation (`dict`, *optional*): filled in by `allocator="auto"`: what was chosen, and the divergence of each.
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
    layer_weight: str = field(default="none", metadata={"help": "How much a layer's error counts."})
    rank_multiple: int | str = field(default="auto", metadata={"help": "Ranks are multiples of it."})
    min_rank_ratio: float = field(default=0.5, metadata={"help": "Least rank, as a part of the uniform one."})
    allow_dense: bool = field(default=True, metadata={"help": "Whether a layer may stay dense."})
    min_saving: float = field(default=0.0, metadata={"help": "Part of its parameters that factors have to save."})
    compensation: str = field(default="auto", metadata={"help": "How later layers make up for earlier ones."})
    compensation_ridge: float = field(default=1e-4, metadata={"help": "Least shrinkage of 'lstsq'."})
    residual_ratio: float = field(default=0.1, metadata={"help": "Rank of the second pair of 'gradient'."})
    compensation_steps: int | None = field(default=None, metadata={"help": "Most steps of 'gradient' and 'kd'."})
    compensation_lr: float | None = field(default=None, metadata={"help": "Learning rate of 'gradient' and 'kd'."})
    bias_correction: bool = field(default=False, metadata={"help": "Whether biases take the mean output over."})
    quantize_factors: str | None = field(default=None, metadata={"help": "'nf4', 'int8' or None."})
    memory_limit: int | None = field(default=None, metadata={"help": "Bytes for input statistics."})
    keep_base_weights: bool = field(default=False, metadata={"help": "Keep the dense weights beside the factors."})
    seed: int = field(default=0, metadata={"help": "Seed of 'gradient' and 'kd'."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train in full."})
    progress: bool = field(default=True, metadata={"help": "Whether to show progress bars."})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Ranks by layer."})
    dense_modules: list[str] = field(default_factory=list, metadata={"help": "Targets that stayed dense."})
    statistics: dict[str, Any] = field(default_factory=dict, metadata={"help": "Error and shrinkage by layer."})
    allocation: dict | None = field(default=None, metadata={"help": "What allocator 'auto' compared and chose."})

    method: ClassVar[str] = "MIXED_RANK"
    card_remark: ClassVar[str] = (
        "It holds the low-rank factors that stand in the place of the base model's weights, or beside them. The base model "
        "is needed to load it; where factors replace weights, `model.merge_and_unload()` gives the smaller model, which "
        "saves and loads without the base."
    )
    not_saved: ClassVar[tuple[str, ...]] = ("calibration_data", "reference_model")

    def __post_init__(self):
        super().__post_init__()
        self._require("keep_ratio", is_number(self.keep_ratio) and 0 < self.keep_ratio <= 1, "in (0, 1]")
        for name, accepted in (
            ("mode", MODES),
            ("budget_scope", BUDGET_SCOPES),
            ("metric", ("auto", *METRICS)),
            ("allocator", (*ALLOCATORS, "auto")),
            ("layer_weight", LAYER_WEIGHTS),
            ("compensation", ("auto", *COMPENSATIONS)),
        ):
            self._require_one_of(name, accepted)
        share = self.shrinkage in (None, "ledoit_wolf") or (is_number(self.shrinkage) and 0 <= self.shrinkage <= 1)
        self._require("shrinkage", share, "'ledoit_wolf', a number in [0, 1], or None")
        self._require("shrinkage_scale", is_number(self.shrinkage_scale) and self.shrinkage_scale >= 0, "at least 0")
        multiple = self.rank_multiple == "auto" or is_count(self.rank_multiple)
        self._require("rank_multiple", multiple, "a positive integer or 'auto'")
        for name in ("min_rank_ratio", "residual_ratio"):
            value = getattr(self, name)
            self._require(name, is_number(value) and 0 <= value <= 1, "in [0, 1]")
        ridge = is_number(self.compensation_ridge) and 0 <= self.compensation_ridge <= 1
        self._require("compensation_ridge", ridge, "in [0, 1]")
        rate = self.compensation_lr is None or (is_number(self.compensation_lr) and self.compensation_lr > 0)
        self._require("compensation_lr", rate, "positive or None")
        self._require("min_saving", is_number(self.min_saving) and 0 <= self.min_saving < 1, "in [0, 1)")
        self._require("seed", is_count(self.seed, 0), "a non-negative integer")
        for name in ("max_calibration_batches", "memory_limit", "compensation_steps"):
            value = getattr(self, name)
            self._require(name, value is None or is_count(value), "a positive integer or None")
        quantized = self.quantize_factors in (None, *SCHEMES)
        self._require("quantize_factors", quantized, f"None or one of {', '.join(SCHEMES)}")
        self._require("residual_rank", is_count(self.residual_rank), "a positive integer")
        for name in ("allow_dense", "bias_correction", "keep_base_weights", "progress"):
            self._require(name, isinstance(getattr(self, name), bool), "True or False")
        ranks = isinstance(self.rank_pattern, dict) and all(
            isinstance(k, str) and is_count(v, 0) for k, v in self.rank_pattern.items()
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
        if self.mode == "residual" and self.compensation in ("gradient", "kd"):
            raise ValueError(
                f"MixedRankConfig.mode='residual' goes with compensation 'lstsq' or 'none', got {self.compensation!r}"
            )
        if self.mode != "residual" and self.reference_model is not None:
            raise ValueError(f"MixedRankConfig.reference_model is only used by mode='residual', got mode={self.mode!r}")
        if self.bias_correction and (self.mode == "residual" or self.compensation == "gradient"):
            raise ValueError(
                "MixedRankConfig.bias_correction goes with mode 'replace' and compensation 'lstsq', 'kd' or 'none', got "
                f"mode={self.mode!r}, compensation={self.compensation!r}"
            )
        if self.bias_correction and self.metric not in ("auto", "second_moment"):
            raise ValueError(
                f"MixedRankConfig.bias_correction needs metric='second_moment', got metric={self.metric!r}"
            )
        if self.compensation in ("lstsq", "gradient", "kd") and self.metric not in ("auto", "second_moment"):
            raise ValueError(
                f"MixedRankConfig.compensation={self.compensation!r} measures errors by the second moment and needs "
                f"metric='second_moment', got metric={self.metric!r}"
            )
