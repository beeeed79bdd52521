"""Fits the fixed projections of `downsample="principal"` on a few batches."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_qst.base_model.offloading import is_offloaded, require_weights
from hf_qst.calibration import CalibrationRun, as_batches, calibration_mode
from hf_qst.calibration.moments import SecondMoment
from hf_qst.qst.downsample import PrincipalDownsample

logger = logging.getLogger(__name__)


class _Statistics:
    """Takes the place of a layer's recorder: collects what each downsampler reads instead of running it."""

    def __init__(self, run: CalibrationRun, places: Sequence[int]):
        self.run, self.places = run, places
        self.moments: dict[int, SecondMoment] = {}

    def record(self, index, entering, leaving, context) -> None:
        # The first downsampler reads the embedding too.
        read = [(self.places[0], entering)] if index == 0 else []
        read += [(index, leaving)] if index in self.places else []
        for place, state in read:
            rows = self.run.rows("decoder stack", state)[0]
            moment = self.moments.setdefault(place, SecondMoment(rows.shape[-1], rows.device))
            moment.add(rows)


@torch.no_grad()
def fit_principal(model: nn.Module, layer, network, batches) -> None:
    """Fit every `PrincipalDownsample` of `network` to the states the base produces on `batches`.

    Args:
        model: the base with its head.
        layer: the `QSTLayer` that holds `network`.
        batches: calibration data, as `hf_qst.calibration.as_batches` takes them, or None to keep random directions.

    Raises:
        CalibrationError: the data cannot be used.
        MissingWeightsError: the base has no weights to run with.
    """
    parts = [part for part in network.downsample if isinstance(part, PrincipalDownsample)]
    if any(buffer.is_meta for part in parts for buffer in part.buffers()):
        return  # the weights are about to be loaded
    if batches is None:
        logger.warning(
            "QSTConfig.downsample='principal' without calibration_data: the projections are random and orthonormal"
        )
        return
    if not is_offloaded(model):
        require_weights(model, "QSTConfig.downsample='principal'")
    batches = as_batches(batches, argument="QSTConfig.calibration_data", model=model)
    run = CalibrationRun(model)
    statistics = _Statistics(run, network.places)
    taken = inspect.signature(layer.base_layer.forward).parameters
    with layer.tape.using(statistics), calibration_mode(model):
        for batch in tqdm(batches, desc="principal directions", unit="batch"):
            inputs = {key: value for key, value in run.enter(batch).items() if key in taken}
            layer.base_layer(**{**inputs, "use_cache": False})
    for index, part in zip(network.places, parts, strict=True):
        part.fit(*statistics.moments[index].mean_and_covariance())
