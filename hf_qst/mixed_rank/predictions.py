"""How far a compressed model's predictions are from the dense one's, in the terms of the model's own loss.

Which distance that is follows from the model's head, as transformers chooses its loss:

- one of several classes: the KL divergence of the softmax, in nats; of segmentation's [batch, classes, height, width]
  over the classes;
- several labels that are true or false each, or one class of pixels: the sum of the labels' KL divergences, in nats;
- regression: the mean squared difference;
- no logits (a backbone): the squared difference of the outputs, as a part of the dense outputs' energy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from hf_qst.calibration import CalibrationError, CalibrationRun, calibration_mode
from hf_qst.calibration.passes import output_tensors

CLASSES, LABELS, REGRESSION, STATES = "classes", "labels", "regression", "states"


@dataclass(frozen=True)
class Prediction:
    """One field of a model's output: what kind of prediction it is, and its values [rows, d] without padding, float32."""

    kind: str
    values: torch.Tensor


class Predictor:
    """Predictions of a model, and of others of its form, on calibration batches.

    Args:
        model: gives the head and the padding.
        batches: model inputs.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Mapping]):
        self.model = model
        self.run = CalibrationRun(model)
        self.run.prepare(batches)

    def __call__(self, model: nn.Module, batch: Mapping) -> dict[str, Prediction]:
        """Predictions by field of the output.

        Raises:
            CalibrationError: the output has no floating-point field.
        """
        tensors = output_tensors(CalibrationRun(model)(batch))
        logits = {key: value for key, value in tensors.items() if key == "logits" or key.endswith("_logits")}
        if not tensors:
            raise CalibrationError(
                f"{type(model).__name__} gives no logits or hidden states, by which predictions are compared"
            )
        self.run.enter(batch)
        fields = logits or {key: value for key, value in tensors.items() if self._fits(key, value)} or tensors
        return {key: self._prediction(key, value, batch) for key, value in fields.items()}

    def _fits(self, key: str, values: torch.Tensor) -> bool:
        """Whether it is known which rows of a field are padding; a table of images by texts has rows of neither."""
        try:
            self.run.rows(f"output {key}", values[:, None] if values.dim() == 1 else values)
        except CalibrationError:
            return False
        return True

    def _prediction(self, key: str, values: torch.Tensor, batch: Mapping) -> Prediction:
        kind = STATES if not key.endswith("logits") else _kind(self.model, values, batch)
        if key in ("start_logits", "end_logits"):
            # A distribution over the positions of each sample.
            return Prediction(kind, values.float())
        if values.dim() > 3 and values.shape[-1] != getattr(self.model.config, "vocab_size", None):
            values = values.movedim(1, -1)
            kind = LABELS if values.shape[-1] == 1 else kind  # one class is there or not at each pixel
        if values.dim() == 1:
            values = values[:, None]
        return Prediction(kind, self.run.rows(f"output {key}", values, detach=False)[0].float())


def _kind(model: nn.Module, logits: torch.Tensor, batch: Mapping) -> str:
    given = getattr(getattr(model, "config", None), "problem_type", None)
    labels = batch.get("labels")
    if given == "regression" or (logits.shape[-1] == 1 and logits.dim() < 4):
        return REGRESSION
    if given == "multi_label_classification" and logits.dim() == 2:
        return LABELS
    if given is None and torch.is_tensor(labels) and labels.is_floating_point() and labels.shape == logits.shape:
        return LABELS
    return CLASSES


def divergence(reference: Mapping[str, Prediction], other: Mapping[str, Prediction]) -> torch.Tensor:
    """Distance of predictions from those of the reference, a mean over rows; that of several fields is added up."""
    return sum(_distance(one.kind, one.values, other[key].values) for key, one in reference.items() if len(one.values))


def _distance(kind: str, reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    if kind == CLASSES:
        log_p, log_q = reference.log_softmax(-1), other.log_softmax(-1)
        return nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    if kind == LABELS:
        total = 0.0
        for sign in (1, -1):
            log_p, log_q = (nn.functional.logsigmoid(sign * logits) for logits in (reference, other))
            total = total + (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        return total
    error = (other - reference).square().mean()
    return error if kind == REGRESSION else error / reference.square().mean().clamp(min=torch.finfo(torch.float32).tiny)


def row_count(predictions: Mapping[str, Prediction]) -> int:
    """Rows that predictions are compared by."""
    return max(len(one.values) for one in predictions.values())


@contextmanager
def installed(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """These modules in the place of the model's own, for a while; one inside another comes before it."""
    own = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            model.set_submodule(name, module)
        yield
    finally:
        for name, module in reversed(own.items()):
            model.set_submodule(name, module)


@torch.no_grad()
def mean_divergence(
    model: nn.Module,
    reference: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Sequence[Mapping],
    predictor: Predictor | None = None,
) -> float:
    """Divergence of a model with these modules in it from the reference, a mean over all rows of the batches.

    Raises:
        CalibrationError: the batches hold no rows.
    """
    predictor = predictor or Predictor(reference, batches)
    total, rows = 0.0, 0
    with calibration_mode(reference), calibration_mode(model):
        for batch in batches:
            expected = predictor(reference, batch)
            count = row_count(expected)
            if not count:
                continue
            with installed(model, modules):
                total += divergence(expected, predictor(model, batch)).item() * count
            rows += count
    if not rows:
        raise CalibrationError(
            "the held-out batches of calibration_data hold no rows by which predictions are compared"
        )
    return total / rows
