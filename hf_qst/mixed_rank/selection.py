"""Which allocator suits a model: the candidates are tried on calibration batches that were held out."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from hf_qst.mixed_rank.distillation import split
from hf_qst.mixed_rank.predictions import mean_divergence

logger = logging.getLogger(__name__)

# Importance alone can starve a layer; a floor under the ranks guards against it, and costs where nothing starves.
CANDIDATES = (
    {"allocator": "hull", "min_rank_ratio": 0.5},
    {"allocator": "hull", "min_rank_ratio": 0.0},
    {"allocator": "uniform"},
)
_HELD_OUT = 0.25


def choose_allocator(model: nn.Module, config, batches: Sequence[Mapping], task: Callable):
    """The configuration with the candidate whose compressed model predicts most like the dense one.

    Every candidate is made from the first batches and measured on the last quarter.

    Args:
        model: as of `compress`.
        config ([`MixedRankConfig`]): with `allocator="auto"`; is not changed.
        batches: model inputs, at least two.
        task: makes the compression for some of the batches; it has `weights`, `ranks(config)` and `factors(ranks)`.

    Returns:
        The configuration, and a record of what was chosen with the divergence of every candidate
        (`hf_qst.mixed_rank.predictions`).

    Raises:
        CalibrationError: there is one batch only, or the model has no outputs to compare.
    """
    training, held_out = split(batches, _HELD_OUT, "allocator='auto'")
    trial = task(training)
    seen: dict[tuple, float] = {}
    found = []
    for candidate in CANDIDATES:
        ranks = trial.ranks(_with(config, candidate))
        key = tuple(sorted(ranks.items()))
        if key not in seen:
            factors = trial.factors(ranks).factors
            modules = {name: trial.weights.in_place(name, layer) for name, layer in factors.items()}
            seen[key] = mean_divergence(model, trial.weights.reference, modules, held_out)
        found.append({**candidate, "divergence": seen[key]})
    chosen = min(range(len(found)), key=lambda i: found[i]["divergence"])
    logger.info("allocator='auto' chose %s from %s", CANDIDATES[chosen], found)
    return _with(config, CANDIDATES[chosen]), {"chosen": CANDIDATES[chosen], "candidates": found}


def _with(config, changes: Mapping):
    changed = copy.copy(config)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed
