"""The configuration of DISP."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from hf_qst.disp.estimators import ESTIMATORS
from hf_qst.disp.hypernetwork import HYPERNETWORKS
from hf_qst.pruning.by_scores import prune_evenly
from hf_qst.pruning.layout import SELECTIONS
from hf_qst.pruning.options import check_options
from hf_qst.pruning.scores import PRUNING_METHODS
from hf_qst.tuner.config import MethodConfig, is_count, is_number

DEFAULT_START = "fisher"
HARDENINGS = ("budget", "threshold")


@dataclass
class DISPConfig(MethodConfig):
    """Configuration of dimension-independent structural pruning (DISP).

    A hypernetwork learns which channels every block's attention and MLP read from the residual and add to it, and which
    of the MLP's own channels stay, while the model's weights are frozen. Gao et al., "DISP-LLM: Dimension-Independent
    Structural Pruning for Large Language Models", NeurIPS 2024, arXiv 2410.11988. The defaults are the paper's, with
    its estimator as derived rather than as printed, and a final choice that is deterministic and on the budget.

    Args:
        keep_ratio (`float`): the part of the parameters to keep, in (0, 1].
        budget_scope (`str`): what it is a part of: `"targets"` (the blocks' parameters) or `"model"` (all parameters).
        regularization (`float`):
            Weight of |ln(T / budget)| beside the loss, where T counts the parameters that the sampled channels leave.
        selections (`list[str]`): which of the five selections of a block are learned; the others keep everything.
        constraint (`str`):
            `"none"`; `"layer"`: the selections on the residual are one and the same within a layer; `"model"`: in all
            layers, as when the residual itself is pruned.
        estimator (`str`):
            Gradients through the binary choice: `"reinmax"`, `"reinmax_as_printed"`, `"straight_through"` or
            `"gumbel_sigmoid"`; see `hf_qst.disp.estimators`.
        initial_bias (`float`): added to every logit; the start keeps a channel with probability sigmoid(initial_bias).
        temperature (`float`): of `"reinmax"`, at least 1.
        gumbel_temperature (`float`): of `"gumbel_sigmoid"`.
        hypernetwork (`str`): `"gru"`, `"linear"` (no recurrence) or `"none"` (a parameter for each logit).
        hypernetwork_input_size (`int`), hypernetwork_hidden_size (`int`): widths in the hypernetwork.
        hardening (`str`):
            The final choice: `"budget"` shifts all logits by one number so that the budget is met, `"threshold"` takes
            them as they are.
        width_multiple (`int` or `str`):
            Every width is a multiple of it, or all channels. `"auto"`: 64 where the residual has 512 channels or more,
            otherwise 1.
        min_width (`int`): no width falls below it.
        start_scores (`str`, *optional*):
            The pruning method, by its name in `hf_qst.pruning.PRUNING_METHODS`, whose choice of channels learning starts
            at; `"none"` is the paper's start, at which all channels are alike. By default `"fisher"`, or `"none"` with a
            warning where there are no data: no `calibration_data`, and training without a `DISPCallback`.
        calibration_data (iterable of `dict`, *optional*):
            A few batches of model inputs for `start_scores`. Without them `DISPCallback` takes rows of the trainer's
            training data. Not saved.
        seed (`int`): of the hypernetwork's start.
        init_weights (`bool`):
            False draws all parameters of the hypernetwork from a standard normal and the global random numbers: a start
            far from the base and from that of any other adapter, for tests and experiments.
        manifest (`dict`, *optional*): filled in on saving: names, shapes, dtypes and checksums of the tensors.
    """

    keep_ratio: float = field(default=0.5, metadata={"help": "The part of the parameters to keep."})
    budget_scope: str = field(default="targets", metadata={"help": "'targets' or 'model'."})
    regularization: float = field(default=6.0, metadata={"help": "Weight of the budget term."})
    selections: list[str] = field(default_factory=lambda: list(SELECTIONS), metadata={"help": "Which are learned."})
    constraint: str = field(default="none", metadata={"help": "Which selections on the residual are the same."})
    estimator: str = field(default="reinmax", metadata={"help": f"One of {', '.join(ESTIMATORS)}."})
    initial_bias: float = field(default=3.0, metadata={"help": "Added to every logit."})
    temperature: float = field(default=1.0, metadata={"help": "Of the estimator 'reinmax', at least 1."})
    gumbel_temperature: float = field(default=0.4, metadata={"help": "Of the estimator 'gumbel_sigmoid'."})
    hypernetwork: str = field(default="gru", metadata={"help": f"One of {', '.join(HYPERNETWORKS)}."})
    hypernetwork_input_size: int = field(default=32, metadata={"help": "Width of the hypernetwork's input."})
    hypernetwork_hidden_size: int = field(default=64, metadata={"help": "Width of its GRU in one direction."})
    hardening: str = field(default="budget", metadata={"help": "'budget' or 'threshold'."})
    width_multiple: int | str = field(default="auto", metadata={"help": "Widths are multiples of it."})
    min_width: int = field(default=1, metadata={"help": "Least width."})
    start_scores: str | None = field(default=None, metadata={"help": "Where learning starts: 'fisher', 'none', ..."})
    calibration_data: Any = field(
        default=None, repr=False, compare=False, metadata={"help": "Batches for start_scores. Not saved."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the hypernetwork's start."})
    target_modules: Any = field(
        default=None, init=False, repr=False, compare=False, metadata={"help": "Set to the decoder stack's path."}
    )

    method: ClassVar[str] = "DISP"
    card_remark: ClassVar[str] = (
        "It holds what pruning learnt about the base model, which is needed to load it. `model.merge_and_unload()` gives "
        "the smaller model, which saves and loads without the base."
    )
    not_saved: ClassVar[tuple[str, ...]] = ("calibration_data", "target_modules")

    def __post_init__(self):
        super().__post_init__()
        check_options(self, f"{type(self).__name__}.")
        for name, accepted in (
            ("estimator", tuple(ESTIMATORS)),
            ("hypernetwork", HYPERNETWORKS),
            ("hardening", HARDENINGS),
        ):
            self._require_one_of(name, accepted)
        weight = is_number(self.regularization) and self.regularization >= 0
        self._require("regularization", weight, "a number of at least 0")
        self._require("initial_bias", is_number(self.initial_bias), "a finite number")
        self._require("temperature", is_number(self.temperature) and self.temperature >= 1, "a number of at least 1")
        gumbel = is_number(self.gumbel_temperature) and self.gumbel_temperature > 0
        self._require("gumbel_temperature", gumbel, "a number above 0")
        for name in ("hypernetwork_input_size", "hypernetwork_hidden_size"):
            self._require(name, is_count(getattr(self, name)), "an integer of at least 1")
        # Where a saved adapter is loaded, a method of somebody's own may be unknown.
        known = self.start_scores in (None, "none", *PRUNING_METHODS) or self.manifest is not None
        self._require("start_scores", known, f"None, none or one of {', '.join(PRUNING_METHODS)}")
        if self.calibration_data is not None and self.start_scores == "none":
            raise ValueError("DISPConfig.calibration_data is not used with start_scores='none': leave it out")
        self._require("seed", is_count(self.seed, 0), "an integer of at least 0")

    def planned_model(self, model, inference: bool):
        """For a plan of inference: pruned to the budget, by the same part everywhere."""
        return prune_evenly(model, self) if inference else None

    @property
    def starting_method(self) -> str | None:
        """Name of the pruning method that learning starts from; None for the paper's start."""
        return None if self.start_scores == "none" else self.start_scores or DEFAULT_START

    @classmethod
    def paper(cls, **changes) -> DISPConfig:
        """The settings of the paper: every channel starts alike, and widths are any numbers."""
        return cls(**{"start_scores": "none", "width_multiple": 1, **changes})
