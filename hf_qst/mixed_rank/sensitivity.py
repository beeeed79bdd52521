"""How much an error in a layer's output matters to the model's loss.

To second order a loss changes by half of E (g . dy)^2 when the output y of a layer changes by dy, with g the loss's
gradient there. For errors of no particular direction that is E||g||^2 E||dy||^2 / d_out: the Fisher information of the
output times the error's energy.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_qst.base_model.linear_layers import dense_shape
from hf_qst.calibration import CalibrationError, CalibrationRun, calibration_mode, hooks
from hf_qst.calibration.data import label_names

logger = logging.getLogger(__name__)

# Inputs of a language model that reads nothing but text.
_TEXT = {"input_ids", "attention_mask", "position_ids", "token_type_ids"}
LAYER_WEIGHTS = ("none", "fisher")


def fisher_weights(
    model: nn.Module, energies: Mapping[str, float], batches: Sequence[Mapping], progress: bool = True
) -> dict[str, float]:
    """Weights of the layers' relative errors, with a mean of 1.

    The loss is the one that the model itself gives for the labels. Batches whose labels are all to be ignored are left
    out, with a warning.

    Args:
        model: the dense model; its parameters, gradients, mode, configuration and the random state are left as they are.
        energies: E||x W||^2, the mean energy of each layer's output over rows, by layer name.
        batches: model inputs with `labels`; a causal language model goes without, its tokens are its labels.

    Raises:
        CalibrationError: there are no labels, the loss is not finite, or it depends on none of the layers.
    """
    gradients = dict.fromkeys(energies, 0.0)
    labelled = [_labelled(model, batch) for batch in batches]
    kept = [index for index, batch in enumerate(labelled) if not _ignores_all(batch.get("labels"))]
    if kept and len(kept) < len(batches):
        logger.warning(
            "layer_weight='fisher': %d of %d batches have no labels to predict and are left out",
            len(batches) - len(kept), len(batches),
        )  # fmt: skip
    with calibration_mode(model), torch.enable_grad(), _same_problem(model):
        for index in tqdm(kept or range(len(batches)), desc="sensitivity", unit="batch", disable=not progress):
            for name, energy in _output_gradients(model, list(energies), labelled[index], index).items():
                gradients[name] += energy
    # The sum over rows of ||g||^2 is their number times E||g||^2.
    raw = {name: gradients[name] / dense_shape(model.get_submodule(name))[1] * energies[name] for name in energies}
    mean = sum(raw.values()) / len(raw)
    if not 0 < mean < float("inf"):
        raise CalibrationError("layer_weight='fisher': the loss on calibration_data has no finite gradient")
    return {name: value / mean for name, value in raw.items()}


@contextmanager
def _same_problem(model: nn.Module) -> Iterator[None]:
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


def _output_gradients(model: nn.Module, names: Sequence[str], batch: Mapping, index: int) -> dict[str, float]:
    """Sum over rows of the squared gradient of the batch's loss at each layer's output, over all of its calls."""
    outputs: list[tuple[str, torch.Tensor]] = []

    def keep(name: str):
        def hook(module, args, output):
            # Behind frozen weights an output has no graph; from here on there is one.
            output = output if output.requires_grad else output.detach().requires_grad_()
            outputs.append((name, output))
            return output

        return hook

    with hooks(model.get_submodule(name).register_forward_hook(keep(name)) for name in names):
        loss = CalibrationRun(model).loss(batch)
    if loss is None:
        raise CalibrationError(
            f"layer_weight='fisher' needs a model with logits and labels in calibration_data; batch {index} has "
            f"{', '.join(batch)}, for which {type(model).__name__} gives no loss"
        )
    if not torch.isfinite(loss):
        raise CalibrationError(f"layer_weight='fisher': the loss on batch {index} of calibration_data is {loss.item()}")
    try:
        gradients = torch.autograd.grad(loss, [output for _, output in outputs], allow_unused=True)
    except RuntimeError as error:
        raise CalibrationError(
            f"layer_weight='fisher': batch {index} gives no gradient at a layer's output ({error})"
        ) from error
    if all(gradient is None for gradient in gradients):
        raise CalibrationError(f"layer_weight='fisher': the loss on batch {index} does not depend on any target")
    total = dict.fromkeys(names, 0.0)
    for (name, _), gradient in zip(outputs, gradients, strict=True):
        # A layer may run and its output not be used, as that of the last vision layers in some multimodal models.
        total[name] += 0.0 if gradient is None else gradient.double().square().sum().item()
    return total
