"""Calibration data as a list of batches, from batches or data set rows of tensors, numpy arrays or lists."""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import nn
from transformers.utils.generic import find_labels

logger = logging.getLogger(__name__)

ACCEPTED = (
    "batches of model inputs, such as {'input_ids': [[...], ...]} with tensors, numpy arrays or lists of equal rows, "
    "or the rows of a tokenised data set"
)
# Number of dimensions of an input in a data set row, without the batch dimension; the first key present decides.
MAIN_INPUTS = {"input_ids": 1, "inputs_embeds": 2, "pixel_values": 3, "input_features": 2, "input_values": 1}
_ROWS_PER_BATCH = 8


class CalibrationError(ValueError):
    """The calibration data, or the model's outputs for it, cannot be used."""


def as_batches(
    data: Iterable[Mapping] | Mapping,
    limit: int | None = None,
    argument: str = "calibration_data",
    model: nn.Module | None = None,
) -> list[dict]:
    """A list of at most `limit` batches.

    Rows without a batch dimension, as from a `datasets.Dataset`, are stacked, up to 8 consecutive rows of one length.
    Texts are dropped. Batches that are only padding are dropped with a warning.

    Args:
        data: see `ACCEPTED`, or a single batch.
        limit (`int`, *optional*): the most batches to read.
        argument (`str`): name of the data in error messages.
        model (*optional*): columns of rows that its forward does not take are dropped, as in Trainer; in a batch they are
            an error.

    Raises:
        CalibrationError: no batches, or one is not a mapping of model inputs; the message names the batch and the key.
    """
    batches = list(itertools.islice(_with_rows_stacked(_items(data, argument), argument, model), limit))
    if not batches:
        raise CalibrationError(f"{argument} must hold at least one batch, got none")
    for index, batch in enumerate(batches):
        if not any(torch.is_tensor(value) and value.numel() for value in batch.values()):
            raise CalibrationError(
                f"{argument}: batch {index} holds no model input (keys: {', '.join(batch) or 'none'})"
            )
    kept = [batch for batch in batches if not _is_padding(batch)]
    if not kept:
        raise CalibrationError(
            f"{argument}: every attention_mask is zero, so that the model sees no rows of calibration_data"
        )
    if len(kept) < len(batches):
        logger.warning(
            "%s: %d of %d batches hold nothing but padding and are left out", argument, len(batches) - len(kept), len(batches)
        )  # fmt: skip
    return kept


def _items(data, argument: str) -> Iterator[dict]:
    """The batches or rows one by one, with arrays and lists as tensors."""
    if isinstance(data, Mapping) and any(key in data for key in MAIN_INPUTS):
        data = [data]
    if isinstance(data, (str, bytes, Mapping)) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise CalibrationError(f"{argument} must hold {ACCEPTED}; got {type(data).__name__}")
    for index, item in enumerate(data):
        if not isinstance(item, Mapping):
            raise CalibrationError(
                f"{argument} must hold mappings of model inputs ({ACCEPTED}); batch {index} is {type(item).__name__}"
            )
        values = {key: _tensor(value, f"{argument}: batch {index}: {key!r}") for key, value in item.items()}
        texts = [key for key, value in values.items() if _is_text(value)]
        kept = {key: value for key, value in values.items() if value is not None and key not in texts}
        if texts and not any(torch.is_tensor(value) for value in kept.values()):
            raise CalibrationError(
                f"{argument}: batch {index} holds text under {texts[0]!r} and no model input: tokenise it first"
            )
        yield kept


def _is_text(value) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and any(isinstance(v, str) for v in value))


def _tensor(value, place: str):
    """A list or array as a tensor. Other values and lists of texts are returned unchanged."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "US":
        return value.tolist()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        # The dtypes of numbers in lists: embeddings and losses take no other integers, and weights no float64 inputs.
        tensor = torch.as_tensor(value.astype({"i": np.int64, "u": np.int64}.get(value.dtype.kind, value.dtype)))
        return tensor.to(torch.get_default_dtype()) if tensor.dtype == torch.float64 else tensor
    if isinstance(value, (list, tuple)) and not value:
        raise CalibrationError(f"{place} is an empty list")
    if isinstance(value, (list, tuple)) and isinstance(value[0], (list, tuple, torch.Tensor, np.ndarray)):
        rows = [_tensor(row, place) for row in value]
        if any(_is_text(row) for row in rows):
            return [text for row in rows for text in (row if isinstance(row, list) else [str(row)])]
        if not all(torch.is_tensor(row) for row in rows):
            raise CalibrationError(f"{place} mixes rows with values: {[type(v).__name__ for v in value][:3]}")
        shapes = sorted({tuple(row.shape) for row in rows})
        if len(shapes) > 1:
            lengths = ", ".join(str(list(shape)) for shape in shapes[:4])
            raise CalibrationError(
                f"{place} has rows of unequal shapes ({lengths}): pad them to one length and give an attention_mask that "
                "is 0 there, or put rows of one length into a batch"
            )
        return torch.stack(rows)
    if isinstance(value, (list, tuple)) and not _is_text(list(value)):
        try:
            return torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            kinds = sorted({type(v).__name__ for v in value})
            raise CalibrationError(
                f"{place} is a list of {', '.join(kinds)}, which makes no tensor: {error}"
            ) from error
    if isinstance(value, np.ndarray):
        if value.dtype == object and value.ndim:
            return _tensor(value.tolist(), place)
        raise CalibrationError(f"{place} is an ndarray of dtype {value.dtype}, which makes no tensor")
    return list(value) if isinstance(value, tuple) else value


def _with_rows_stacked(items: Iterator[dict], argument: str, model: nn.Module | None) -> Iterator[dict]:
    """Batches unchanged, and rows stacked to batches."""
    rows: list[dict] = []
    for index, item in enumerate(items):
        is_row = _is_row(item)
        if rows and (not is_row or len(rows) == _ROWS_PER_BATCH or _shapes(item) != _shapes(rows[0])):
            yield _stack(rows, model, argument)
            rows = []
        if is_row:
            rows.append(item)
        else:
            _require_taken(item, model, f"{argument}: batch {index}")
            yield item
    if rows:
        yield _stack(rows, model, argument)


def _is_row(item: Mapping) -> bool:
    for key, dimensions in MAIN_INPUTS.items():
        if torch.is_tensor(item.get(key)):
            return item[key].dim() == dimensions
    return False


def _shapes(item: Mapping) -> dict:
    return {key: tuple(value.shape) if torch.is_tensor(value) else type(value) for key, value in item.items()}


def _stack(rows: list[dict], model: nn.Module | None, argument: str) -> dict:
    """One batch from rows with equal shapes."""
    batch = {}
    for key in rows[0]:
        values = [row[key] for row in rows]
        if torch.is_tensor(values[0]):
            batch[key] = torch.stack(values)
        elif isinstance(values[0], (bool, int, float, np.generic)):
            batch[key] = torch.as_tensor([v.item() if isinstance(v, np.generic) else v for v in values])
    if "label" in batch and "labels" not in batch:
        batch["labels"] = batch.pop("label")
    taken = None if model is None else _arguments(model)[0]
    others = [] if taken is None else [key for key in batch if key not in taken]
    if others:
        logger.info("%s: columns %s are left out: %s does not take them", argument, others, type(model).__name__)
    return {key: value for key, value in batch.items() if key not in others}


def _arguments(model: nn.Module) -> tuple[set[str], bool]:
    """Argument names of the model's forward, and whether it has `**kwargs`."""
    parameters = inspect.signature(model.forward).parameters
    several = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return {*parameters, *label_names(model)}, several


def _require_taken(batch: Mapping, model: nn.Module | None, place: str) -> None:
    if model is None:
        return
    taken, several = _arguments(model)
    if unknown := [key for key in batch if key not in taken and not several]:
        raise CalibrationError(
            f"{place} has {unknown[0]!r}, which {type(model).__name__}.forward does not take; it takes "
            f"{', '.join(sorted(taken))}"
        )


def label_names(model: nn.Module) -> set[str]:
    """Keys of a batch for the targets of the model's loss."""
    return {"labels", *find_labels(type(model))}


def _is_padding(batch: Mapping) -> bool:
    masks = [v for k, v in batch.items() if k in ("attention_mask", "decoder_attention_mask") and torch.is_tensor(v)]
    return bool(masks) and not any(mask.any() for mask in masks)
