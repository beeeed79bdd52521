"""The paper's stages in order: decomposition, allocation of ranks, compensation; then training where it is asked for."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace

from hf_qst.mixed_rank.allocation.stage import allocate, fixed_ranks, weigh
from hf_qst.mixed_rank.calibration_set import CalibrationSet
from hf_qst.mixed_rank.compensation.distillation import HELD_OUT, distil
from hf_qst.mixed_rank.compensation.stage import compensate
from hf_qst.mixed_rank.config import CompressionResults
from hf_qst.mixed_rank.decomposition.spectrum import DENSE
from hf_qst.mixed_rank.decomposition.stage import Decomposition
from hf_qst.mixed_rank.layer import LowRankLinear
from hf_qst.mixed_rank.predictions import mean_divergence
from hf_qst.mixed_rank.target_weights import TargetWeights

logger = logging.getLogger(__name__)

# Importance alone can starve a layer; a floor under the ranks guards against it, and costs where nothing starves.
CANDIDATES = (
    {"allocator": "hull", "min_rank_ratio": 0.5},
    {"allocator": "hull", "min_rank_ratio": 0.0},
    {"allocator": "uniform"},
)
# Part of the batches that candidates are measured on.
_MEASURED = 0.25


@dataclass
class Compression:
    """The outcome: factors by layer name, the names of layers that stay dense, and what is known of each layer.

    `allocation` and `distillation` say what the allocator `"auto"` and the compensation `"kd"` measured on held-out
    batches.
    """

    factors: dict[str, LowRankLinear] = field(default_factory=dict)
    dense: list[str] = field(default_factory=list)
    statistics: dict[str, dict] = field(default_factory=dict)
    allocation: dict | None = None
    distillation: dict | None = None

    @property
    def ranks(self) -> dict[str, int]:
        return {name: layer.rank for name, layer in self.factors.items()}

    @property
    def results(self) -> CompressionResults:
        """All but the factors, as the configuration keeps it."""
        return CompressionResults(self.dense, self.statistics, self.allocation, self.distillation)


class Pipeline:
    """One compression of one model.

    Args:
        weights: of the targets.
        settings ([`MixedRankConfig`]): resolved.
        calibration (*optional*): batches; not needed by plain settings.
    """

    def __init__(self, weights: TargetWeights, settings, calibration: CalibrationSet | None):
        self.weights, self.settings, self.calibration = weights, settings, calibration
        self.fixed = fixed_ranks(weights, settings)

    def run(self) -> Compression:
        """Factors for all targets."""
        held_out = choice = None
        if self.settings.compensation.method == "kd":
            self.calibration, held_out = self.calibration.split(HELD_OUT, "compensation='kd'")
        if self.settings.allocation.allocator == "auto":
            choice = self._choose_allocator()
        layers = self.decompose()
        ranks = self.allocate(layers)
        factors = self.compensate(layers, ranks)
        distillation = self._distil(factors, held_out) if held_out and factors else None
        error = lambda name: layers.spectra[name].relative_error(ranks[name])
        statistics = {name: {"relative_error": error(name), **layers.facts[name]} for name in ranks}
        dense = [name for name in self.weights.names if ranks[name] == DENSE]
        result = Compression(factors, dense, statistics, choice, distillation)
        self._log(result, layers)
        return result

    def decompose(self) -> Decomposition:
        """Stage 1: what each layer loses at each rank."""
        layers = Decomposition(self.weights, self.settings, self.calibration)
        weigh(self.weights, layers, self.calibration, self.settings)
        return layers

    def allocate(self, layers: Decomposition) -> dict[str, int]:
        """Stage 2: a rank for each layer."""
        return allocate(self.weights, layers, self.fixed, self.settings)

    def compensate(self, layers: Decomposition, ranks: dict[str, int]) -> dict[str, LowRankLinear]:
        """Stage 3: factors of these ranks."""
        return compensate(self.weights, layers, ranks, self.settings, self.calibration)

    def _distil(self, factors: dict[str, LowRankLinear], held_out: CalibrationSet) -> dict[str, float]:
        """Train the factors, in place; what was to be quantised is quantised after that."""
        divergences = distil(self.weights.model, factors, self.calibration, held_out, self.settings)
        for layer in factors.values():
            self.weights.quantize(layer)
        return divergences

    def _choose_allocator(self) -> dict:
        """Take the candidate whose compressed model predicts most like the dense one.

        Every candidate is made from the first batches and measured on the last quarter.

        Returns:
            What was chosen, and the divergence of every candidate (`hf_qst.mixed_rank.predictions`).
        """
        training, held_out = self.calibration.split(_MEASURED, "allocator='auto'")
        # What training would add to each candidate is not needed to compare them.
        method = self.settings.compensation.method
        compensation = replace(self.settings.compensation, method="lstsq" if method == "kd" else method)
        trial = Pipeline(self.weights, self.settings.changed(compensation=compensation), training)
        layers, divergence, candidates = trial.decompose(), {}, []
        for candidate in CANDIDATES:
            trial.settings = self._with_allocator(trial.settings, candidate)
            ranks = trial.allocate(layers)
            key = tuple(sorted(ranks.items()))
            if key not in divergence:
                self.weights.forget()
                factors = trial.compensate(layers, ranks)
                modules = {name: self.weights.in_place(name, layer) for name, layer in factors.items()}
                divergence[key] = mean_divergence(self.weights.model, self.weights.reference, modules, held_out.batches)
            candidates.append({**candidate, "divergence": divergence[key]})
        best = min(range(len(candidates)), key=lambda i: candidates[i]["divergence"])
        self.weights.forget()
        logger.info("allocator='auto' chose %s from %s", CANDIDATES[best], candidates)
        self.settings = self._with_allocator(self.settings, CANDIDATES[best])
        return {"chosen": CANDIDATES[best], "candidates": candidates}

    def _with_allocator(self, settings, candidate: dict):
        return settings.changed(allocation=replace(self.settings.allocation, **candidate))

    def _log(self, result: Compression, layers: Decomposition) -> None:
        spectra = [layers.spectra[name] for name in result.factors]
        error = sum(facts["relative_error"] for facts in result.statistics.values()) / len(result.statistics)
        logger.info(
            "%d of %d layers have factors (ranks %d to %d): %d parameters %s %d; mean relative output error %.4f",
            len(spectra), len(self.weights.names), min(result.ranks.values(), default=0),
            max(result.ranks.values(), default=0), sum(one.cost(result.ranks[one.name]) for one in spectra),
            "added to" if self.weights.residual else "in the place of", sum(one.dense_cost for one in spectra), error,
        )  # fmt: skip
