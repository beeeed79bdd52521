"""Batches with labels, and the loss that a model itself gives for them: for what is learned from its gradients."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_qst.calibration.data import CalibrationError, label_names
from hf_qst.calibration.passes import CalibrationRun

logger = logging.getLogger(__name__)

# Inputs of a language model that reads nothing but text.
_TEXT = {"input_ids", "attention_mask", "position_ids", "token_type_ids"}


def labelled_batches(model: nn.Module, batches: Sequence[Mapping], user: str) -> list[tuple[int, Mapping]]:
    """Each batch with labels, and its place in `batches`.

    Batches whose labels are all to be ignored are left out, with a warning.

    Args:
        batches: model inputs with `labels`; a causal language model goes without, its tokens are its labels.
        user (`str`): what needs the labels, as messages call it.
    """
    labelled = [(index, _labelled(model, batch)) for index, batch in enumerate(batches)]
    kept = [(index, batch) for index, batch in labelled if not _ignores_all(batch.get("labels"))]
    if kept and len(kept) < len(batches):
        logger.warning(
            "%s: %d of %d batches have no labels to predict and are left out",
            user, len(batches) - len(kept), len(batches),
        )  # fmt: skip
    return kept or labelled


def own_loss(model: nn.Module, batch: Mapping, index: int, user: str) -> torch.Tensor:
    """The loss that the model gives for a batch of `labelled_batches`, with its graph.

    Raises:
        CalibrationError: there are no labels, or the loss is not finite; the message names the batch and `user`.
    """
    loss = CalibrationRun(model).loss(batch)
    if loss is None:
        raise CalibrationError(
            f"{user} needs a model with logits and labels in calibration_data; batch {index} has "
            f"{', '.join(batch)}, for which {type(model).__name__} gives no loss"
        )
    if not torch.isfinite(loss):
        raise CalibrationError(f"{user}: the loss on batch {index} of calibration_data is {loss.item()}")
    return loss


def are_own_labels(model: nn.Module, batches: Sequence[Mapping]) -> bool:
    """Whether this is a causal language model, and the batches are text alone, with or without labels."""
    return _is_causal(model) and all("input_ids" in batch and set(batch) <= {*_TEXT, "labels"} for batch in batches)


def label_count(model: nn.Module, batch: Mapping) -> int:
    """How many labels of a batch of `labelled_batches` the loss is a mean over."""
    labels = batch["labels"]
    # A causal language model predicts nothing for the first token of a row.
    return int(((labels[:, 1:] if _is_causal(model) else labels) != -100).sum())


@contextmanager
def same_problem(model: nn.Module) -> Iterator[None]:
    """transformers writes the problem that it guesses from the labels into the configuration; that is taken back."""
    config = getattr(model, "config", None)
    before = getattr(config, "problem_type", None)
    try:
        yield
    finally:
        if getattr(config, "problem_type", None) != before:
            config.problem_type = before


def _labelled(model: nn.Module, batch: Mapping) -> Mapping:
    """The batch with labels: its own, or a causal language model's tokens."""
    if batch.keys() & label_names(model) or not _is_causal(model) or set(batch) - _TEXT:
        return batch
    labels = batch["input_ids"]
    if batch.get("attention_mask") is not None:
        kept = batch["attention_mask"].bool()
        # Nothing is to be predicted at padding, and from padding nothing is: what comes first has nothing before it.
        kept = kept & nn.functional.pad(kept[:, :-1], (1, 0))
        labels = labels.masked_fill(~kept, -100)
    return {**batch, "labels": labels}


def _is_causal(model: nn.Module) -> bool:
    """Whether the model's labels are its tokens, moved by one."""
    # A model with changed shapes answers with the name of its architecture's class.
    name = model._get_name()
    return name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _ignores_all(labels) -> bool:
    whole = torch.is_tensor(labels) and not labels.is_floating_point()
    return whole and bool((labels == -100).all())
