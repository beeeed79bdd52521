"""Fits the fixed projections of `downsample="principal"` on a few batches."""

from __future__ import annotations

import logging

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_qst.moments import SecondMoment
from hf_qst.qst.downsample import PrincipalDownsample

logger = logging.getLogger(__name__)


class _Statistics:
    """Takes the place of a layer's recorder: collects what each downsampler reads instead of running it."""

    def __init__(self, network):
        self.network = network
        self.moments: dict[int, SecondMoment] = {}
        self.kept: torch.Tensor | None = None

    def record(self, index, entering, leaving, context) -> None:
        for state in (entering, leaving) if index == 0 else (leaving,):
            rows = state.detach().flatten(0, -2)
            if self.kept is not None:
                rows = rows[self.kept.to(rows.device)]
            moment = self.moments.setdefault(index, SecondMoment(rows.shape[-1], rows.device))
            moment.add(rows)


@torch.no_grad()
def fit_principal(model: nn.Module, layer, network, batches) -> None:
    """Fit every `PrincipalDownsample` of `network` to the states the base produces on `batches`.

    Args:
        model: the base with its head (for the device of its inputs).
        layer: the `QSTLayer` that holds `network`.
        batches: iterable of model inputs (`input_ids`, `attention_mask`), or None to keep random directions.
    """
    parts = [part for part in network.downsample if isinstance(part, PrincipalDownsample)]
    if any(buffer.is_meta for part in parts for buffer in part.buffers()):
        return  # the weights are about to be loaded
    if batches is None:
        logger.warning(
            "QSTConfig.downsample='principal' without calibration_data: the projections are random and orthonormal"
        )
        return
    statistics = _Statistics(network)
    device = model.get_input_embeddings().weight.device
    was_training = model.training
    model.eval()
    layer.tape.recorder = statistics
    try:
        for batch in tqdm(batches, desc="principal directions", unit="batch"):
            inputs = {
                k: torch.as_tensor(v).to(device) for k, v in batch.items() if k in ("input_ids", "attention_mask")
            }
            mask = inputs.get("attention_mask")
            statistics.kept = None if mask is None else mask.bool().flatten()
            layer.base_layer(**inputs, use_cache=False)
    finally:
        layer.tape.recorder = None
        model.train(was_training)
    if not statistics.moments:
        raise ValueError("QSTConfig.calibration_data must hold at least one batch, got none")
    for index, part in enumerate(parts):
        part.fit(*statistics.moments[index].mean_and_covariance())
