"""Fits the fixed projections of `downsample="principal"` on a few batches."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence

import torch
from torch import nn

from hf_qst.base_model.block_calls import hidden_of
from hf_qst.base_model.offloading import is_offloaded, require_weights
from hf_qst.calibration import as_batches, collect_statistics, first_input
from hf_qst.qst.downsample import PrincipalDownsample

logger = logging.getLogger(__name__)


@torch.no_grad()
def fit_principal(
    model: nn.Module,
    stack: nn.Module,
    blocks: Sequence[nn.Module],
    state: Callable[[torch.Tensor], torch.Tensor],
    reads_embedding: bool,
    downsamplers,
    batches,
) -> None:
    """Fit every `PrincipalDownsample` to the states that the base produces on `batches`.

    Args:
        model: the base with its head.
        stack: the base's decoder stack; `blocks` are those of its blocks that have a side block.
        state: of what a block is given or returns, the state [batch, seq, hidden].
        reads_embedding: whether the first of `blocks` is the stack's first, so that its input is the embedding.
        downsamplers: one per block. Each is fitted to its block's output, the first also to the embedding it reads.
        batches: calibration data, as `hf_qst.calibration.as_batches` takes them, or None to keep random directions.

    Raises:
        CalibrationError: the data cannot be used, or a state is not finite.
        MissingWeightsError: the base has no weights to run with.
    """
    if any(buffer.is_meta for part in downsamplers for buffer in part.buffers()):
        return  # the weights are about to be loaded
    if batches is None:
        logger.warning(
            "QSTConfig.downsample='principal' without calibration_data: the projections are random and orthonormal"
        )
        return
    if not is_offloaded(model):
        require_weights(model, "QSTConfig.downsample='principal'")
    taken = inspect.signature(stack.forward).parameters
    batches = as_batches(batches, argument="QSTConfig.calibration_data", model=model)
    batches = [{key: value for key, value in batch.items() if key in taken} for batch in batches]
    names = {module: name for name, module in stack.named_modules()}
    groups = [(names[block],) for block in blocks]

    def states(module, args, kwargs, output) -> list[torch.Tensor]:
        leaving = state(hidden_of(output))
        return [state(first_input(args, kwargs)), leaving] if reads_embedding and module is blocks[0] else [leaving]

    moments = collect_statistics(stack, groups, batches, label="principal directions", states=states)
    for group, part in zip(groups, downsamplers, strict=True):
        if isinstance(part, PrincipalDownsample):
            part.fit(*moments[group].mean_and_covariance())
