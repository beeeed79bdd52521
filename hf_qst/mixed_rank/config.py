"""The configuration of mixed-rank compression."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from hf_qst.calibration import CalibrationError
from hf_qst.mixed_rank.allocation.allocators import ALLOCATORS
from hf_qst.mixed_rank.compensation.gradient import GRADIENT_LEARNING_RATE, GRADIENT_STEPS
from hf_qst.mixed_rank.earlier_names import accept_earlier_names
from hf_qst.mixed_rank.quantization import SCHEMES
from hf_qst.mixed_rank.stage_configs import (
    AllocationConfig,
    CompensationConfig,
    DecompositionConfig,
    ResidualConfig,
    StageConfig,
)
from hf_qst.mixed_rank.workload import blocks_of, with_uniform_ranks, workload
from hf_qst.tuner.config import BUDGET_SCOPES, MethodConfig, is_count, is_number

logger = logging.getLogger(__name__)


@dataclass
class CompressionResults:
    """What a compression chose and measured.

    Args:
        dense_modules (`list[str]`): the targets that stayed dense.
        statistics (`dict`): per layer the relative output error of its rank and the shrinkage.
        allocation (`dict`, *optional*): what the allocator `"auto"` chose, and the divergence of each candidate.
        distillation (`dict`, *optional*): the divergence before and after `"kd"`, and the number of steps.
    """

    dense_modules: list[str] = field(default_factory=list)
    statistics: dict[str, Any] = field(default_factory=dict)
    allocation: dict | None = None
    distillation: dict | None = None


@accept_earlier_names
@dataclass
class MixedRankConfig(MethodConfig):
    """Configuration of activation-aware mixed-rank compression.

    Every target's weight is replaced by two factors with a rank of its own, chosen under one budget of parameters, so
    that what the layer gives for the calibration data changes least. Azizi, Nazemi and Pedram, "Memory-Efficient Vision
    Transformers: An Activation-Aware Mixed-Rank Compression Strategy", arXiv 2402.06004; the defaults are closed forms
    where the paper searches.

    Each stage has settings of its own, given as its configuration, as a dict of that's fields, or as the name of a
    variant: `decomposition="plain"`, `allocation="uniform"`, `compensation="kd"`.

    Args:
        keep_ratio (`float`): the part of the parameters to keep, in (0, 1].
        budget_scope (`str`): what it is a part of: `"targets"` (the targets' weights) or `"model"` (all parameters).
        target_modules (`list[str]` or `str`, *optional*):
            Layers to compress: names or their endings, a regular expression of full names, or `"all-linear"` (also
            None): every linear layer inside the transformer blocks.
        exclude_modules (`list[str]` or `str`, *optional*): layers to leave out, named in the same ways.
        calibration_data (iterable of mappings, *optional*):
            Model inputs, masks included where there is padding, as tensors, numpy arrays or lists; or the rows of a
            tokenised data set. Every module's rows are masked by the mask of its own sequence. Read once, not saved.
            Without it the plain SVD is used, with a warning, or an error if a metric that needs data was asked for.
        max_calibration_batches (`int`, *optional*): how many of them to use.
        decomposition ([`DecompositionConfig`], `dict` or `str`): how errors are measured; a string is the metric.
        allocation ([`AllocationConfig`], `dict` or `str`): how ranks are chosen; a string is the allocator.
        compensation ([`CompensationConfig`], `dict` or `str`):
            How factors make up for the errors of layers before them; a string is the method.
        residual ([`ResidualConfig`] or `dict`, *optional*):
            Add factors to layers that are compressed already (quantised or pruned), for what these have lost against a
            dense model. None puts factors in the place of dense weights.
        quantize_factors (`str`, *optional*):
            `"nf4"` or `"int8"`: hold the factors so, by bitsandbytes. They do not train any more.
        keep_base_weights (`bool`):
            Keep the dense weights as well, so that adapters can be added, switched, disabled, merged,
            unmerged, deleted and unloaded as those of PEFT's own methods. Residuals always do.
        memory_limit (`int`, *optional*):
            Bytes that the input statistics may take at once, and the activations that the compensation keeps in each of the
            two models; more passes are made instead.
        seed (`int`): of the random start of `"gradient"` and the order of batches in `"kd"`.
        modules_to_save (`list[str]`, *optional*): further modules to train in full and to save.
        progress (`bool`): whether to show progress bars.
        rank_pattern (`dict[str, int]`):
            Ranks by layer, named as in `target_modules`; 0 keeps a layer dense. The budget is shared by the others. Of
            a compressed model: the rank of every compressed layer, by its full name.
        init_weights, manifest: as of `MethodConfig`.

    Attributes:
        results ([`CompressionResults`]): what the compression chose and measured; saved with the adapter.
    """

    keep_ratio: float = field(default=0.4, metadata={"help": "The part of the parameters to keep."})
    budget_scope: str = field(default="targets", metadata={"help": "'targets' or 'model'."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers to compress."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers to leave out."})
    calibration_data: Iterable[Mapping] | None = field(
        default=None, repr=False, compare=False, metadata={"help": "A few batches of model inputs; not saved."}
    )
    max_calibration_batches: int | None = field(default=None, metadata={"help": "How many batches to use."})
    decomposition: DecompositionConfig | dict | str = field(
        default_factory=DecompositionConfig, metadata={"help": "How errors are measured."}
    )
    allocation: AllocationConfig | dict | str = field(
        default_factory=AllocationConfig, metadata={"help": "How ranks are chosen."}
    )
    compensation: CompensationConfig | dict | str = field(
        default_factory=CompensationConfig, metadata={"help": "How later layers make up for earlier ones."}
    )
    residual: ResidualConfig | dict | None = field(
        default=None, metadata={"help": "Add factors to compressed layers, for what these have lost."}
    )
    quantize_factors: str | None = field(default=None, metadata={"help": "'nf4', 'int8' or None."})
    keep_base_weights: bool = field(default=False, metadata={"help": "Keep the dense weights as well."})
    memory_limit: int | None = field(default=None, metadata={"help": "Bytes for input statistics."})
    seed: int = field(default=0, metadata={"help": "Seed of 'gradient' and 'kd'."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train in full."})
    progress: bool = field(default=True, metadata={"help": "Whether to show progress bars."})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Ranks by layer."})
    results: CompressionResults = field(
        init=False, repr=False, default_factory=CompressionResults, metadata={"help": "What was chosen and measured."}
    )

    method: ClassVar[str] = "MIXED_RANK"
    card_remark: ClassVar[str] = (
        "It holds the low-rank factors that stand in the place of the base model's weights, or beside them. The base model "
        "is needed to load it; where factors replace weights, `model.merge_and_unload()` gives the smaller model, which "
        "saves and loads without the base."
    )
    not_saved: ClassVar[tuple[str, ...]] = ("calibration_data",)
    stages: ClassVar[dict[str, type[StageConfig]]] = {
        "decomposition": DecompositionConfig,
        "allocation": AllocationConfig,
        "compensation": CompensationConfig,
        "residual": ResidualConfig,
    }

    def __post_init__(self):
        super().__post_init__()
        for name, stage in self.stages.items():
            value = getattr(self, name)
            setattr(self, name, None if name == "residual" and value is None else stage.of(value))
        self._require("keep_ratio", is_number(self.keep_ratio) and 0 < self.keep_ratio <= 1, "in (0, 1]")
        self._require_one_of("budget_scope", BUDGET_SCOPES)
        self._require("seed", is_count(self.seed, 0), "a non-negative integer")
        for name in ("max_calibration_batches", "memory_limit"):
            value = getattr(self, name)
            self._require(name, value is None or is_count(value), "a positive integer or None")
        quantized = self.quantize_factors in (None, *SCHEMES)
        self._require("quantize_factors", quantized, f"None or one of {', '.join(SCHEMES)}")
        for name in ("keep_base_weights", "progress"):
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
        metric, method = self.decomposition.metric, self.compensation.method
        if self.residual and method in ("gradient", "kd"):
            raise ValueError(f"MixedRankConfig.residual goes with compensation 'lstsq' or 'none', got {method!r}")
        if self.decomposition.bias_correction and (self.residual or method == "gradient"):
            raise ValueError(
                "MixedRankConfig.decomposition.bias_correction goes with compensation 'lstsq', 'kd' or 'none' and without "
                f"residual, got compensation={method!r}, residual={self.residual!r}"
            )
        second_moment = metric in ("auto", "second_moment")
        if self.decomposition.bias_correction and not second_moment:
            raise ValueError(
                f"MixedRankConfig.decomposition.bias_correction needs metric='second_moment', got metric={metric!r}"
            )
        if method in ("lstsq", "gradient", "kd") and not second_moment:
            raise ValueError(
                f"MixedRankConfig.compensation={method!r} measures errors by the second moment and needs "
                f"metric='second_moment', got metric={metric!r}"
            )

    @property
    def mode(self) -> str:
        """`"residual"` where factors are added to the layers, `"replace"` where they take their place."""
        return "replace" if self.residual is None else "residual"

    def to_dict(self) -> dict:
        """The configuration as JSON-ready data, without batches and models."""
        values = super(MixedRankConfig, self.without_data()).to_dict()
        if values["residual"] is not None:
            del values["residual"]["reference_model"]
        return values

    def without_data(self) -> MixedRankConfig:
        """A copy that holds neither batches nor models."""
        residual = self.residual and dataclasses.replace(self.residual, reference_model=None)
        return self.changed(calibration_data=None, residual=residual)

    def resolved(self, has_data: bool, narrowest: int) -> MixedRankConfig:
        """A copy in which every setting is plain but for the allocator `"auto"`, which is a search of its own.

        Args:
            has_data (`bool`): whether there are calibration batches.
            narrowest (`int`): the least width of all targets.

        Raises:
            CalibrationError: a setting needs data and there is none.
        """
        decomposition, allocation, compensation = self.decomposition, self.allocation, self.compensation
        if not has_data:
            self._require_no_data()
        metric, method = decomposition.metric, compensation.method
        if metric == "auto":
            metric = "second_moment" if has_data else "plain"
        if method == "auto":
            method = "lstsq" if metric == "second_moment" else "none"
        steps, rate = compensation.steps, compensation.lr
        if method == "gradient":
            steps, rate = steps or GRADIENT_STEPS, rate or GRADIENT_LEARNING_RATE
        allocation = dataclasses.replace(allocation, rank_multiple=self._rank_multiple(narrowest))
        if self.residual:
            # A residual saves nothing; it is added.
            allocation.min_saving, allocation.allow_dense = 0.0, False
        return self.changed(
            decomposition=dataclasses.replace(decomposition, metric=metric),
            allocation=allocation,
            compensation=dataclasses.replace(compensation, method=method, steps=steps, lr=rate),
        )

    def planned_model(self, model, inference: bool):
        """For a plan: with factors of one part of every layer, or the dense model that is compressed."""
        return with_uniform_ranks(model, self) if inference else model

    def planned_work(self, model, rows: int, tokens: int) -> dict[str, int]:
        """For a plan: bytes of statistics, of states and activations, of one layer's matrices and of the factors."""
        width = next(p for p in model.parameters() if p.is_floating_point()).element_size()
        blocks, hidden = blocks_of(model, self), model.config.get_text_config().hidden_size
        counted = workload(blocks, hidden, rows * tokens, self.keep_ratio, self.memory_limit, width)
        statistics, whole = counted["moments_bytes"], counted["all_moments_bytes"]
        compensated = self.resolved(has_data=True, narrowest=hidden).compensation.method != "none"
        if not compensated and whole <= (self.memory_limit or whole):
            statistics = whole  # the factors are made of them when all ranks are known, without another pass
        return {
            "input statistics": statistics,
            "states and activations": counted["hidden_states_bytes"] + counted["kept_in_a_block_bytes"],
            "matrices of one layer": counted["largest_layer_bytes"],
            "factors": counted["factors_bytes"],
        }

    def changed(self, **changes) -> MixedRankConfig:
        """A copy with other values of these fields, which are taken as they are."""
        changed = copy.copy(self)
        for name, value in changes.items():
            setattr(changed, name, value)
        return changed

    def _require_no_data(self) -> None:
        for stage, name, without_data in (
            (self.allocation, "allocator", ALLOCATORS),
            (self.allocation, "layer_weight", ("auto", "none")),
            (self.decomposition, "bias_correction", (False,)),
            (self.compensation, "method", ("auto", "none")),
            (self.decomposition, "metric", ("auto", "plain")),
        ):
            value = getattr(stage, name)
            if value not in without_data:
                raise CalibrationError(f"{stage.where}.{name}={value!r} needs calibration_data, got None")
        if self.decomposition.metric == "auto":
            logger.warning(
                "MixedRankConfig without calibration_data: the plain SVD of the weights is used, which ignores what the "
                "layers are used for"
            )

    def _rank_multiple(self, narrowest: int) -> int:
        if self.allocation.rank_multiple != "auto":
            return self.allocation.rank_multiple
        if narrowest < 256:
            return 1
        # bitsandbytes' fast 4-bit kernels want inputs in whole blocks of 64; that step is too coarse for narrow layers.
        return 64 if self.quantize_factors == "nf4" and narrowest >= 1024 else 8
