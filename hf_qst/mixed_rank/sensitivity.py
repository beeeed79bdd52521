"""How much an error in a layer's output matters to the model's loss.

To second order a loss changes by half of E (g . dy)^2 when the output y of a layer changes by dy, with g the loss's
gradient there. For errors of no particular direction that is E||g||^2 E||dy||^2 / d_out: the Fisher information of the
output times the error's energy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_qst.calibration import CalibrationError, CalibrationRun, calibration_mode, hooks
from hf_qst.linear_layers import dense_shape

LAYER_WEIGHTS = ("none", "fisher")


def fisher_weights(
    model: nn.Module, energies: Mapping[str, float], batches: Sequence[Mapping], progress: bool = True
) -> dict[str, float]:
    """Weights of the layers' relative errors, with a mean of 1.

    Args:
        model: the dense model; its parameters, gradients, mode and the random state are left as they are.
        energies: E||x W||^2, the mean energy of each layer's output over rows, by layer name.
        batches: model inputs with `labels`; a causal language model goes without, its tokens are its labels.

    Raises:
        CalibrationError: there are no labels, the loss is not finite, or it does not depend on a layer.
    """
    gradients = dict.fromkeys(energies, 0.0)
    with calibration_mode(model), torch.enable_grad():
        for index, batch in enumerate(tqdm(batches, desc="sensitivity", unit="batch", disable=not progress)):
            for name, energy in _output_gradients(model, list(energies), batch, index).items():
                gradients[name] += energy
    # The sum over rows of ||g||^2 is their number times E||g||^2.
    raw = {name: gradients[name] / dense_shape(model.get_submodule(name))[1] * energies[name] for name in energies}
    mean = sum(raw.values()) / len(raw)
    if not 0 < mean < float("inf"):
        raise CalibrationError("layer_weight='fisher': the loss on calibration_data has no finite gradient")
    return {name: value / mean for name, value in raw.items()}


def _output_gradients(model: nn.Module, names: Sequence[str], batch: Mapping, index: int) -> dict[str, float]:
    """Sum over rows of the squared gradient of the batch's loss at each layer's output."""
    run = CalibrationRun(model)
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str):
        def hook(module, args, output):
            # Behind frozen weights an output has no graph; from here on there is one.
            outputs[name] = output if output.requires_grad else output.detach().requires_grad_()
            return outputs[name]

        return hook

    with hooks(model.get_submodule(name).register_forward_hook(keep(name)) for name in names):
        loss = _loss(run, batch, index)
    if not torch.isfinite(loss):
        raise CalibrationError(f"layer_weight='fisher': the loss on batch {index} of calibration_data is {loss.item()}")
    try:
        found = torch.autograd.grad(loss, list(outputs.values()))
    except RuntimeError as error:
        raise CalibrationError(
            f"layer_weight='fisher': batch {index} gives no gradient at a layer's output ({error})"
        ) from error
    return {name: gradient.double().square().sum().item() for name, gradient in zip(outputs, found, strict=True)}


def _loss(run: CalibrationRun, batch: Mapping, index: int) -> torch.Tensor:
    logits = getattr(run(batch), "logits", None)
    labels = batch.get("labels")
    shifted = logits is not None and logits.dim() == 3
    if labels is None and shifted and "input_ids" in batch:
        labels = batch["input_ids"]
        if "attention_mask" in batch:
            labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    if logits is None or labels is None:
        raise CalibrationError(
            f"layer_weight='fisher' needs a model with logits and labels in calibration_data; batch {index} has "
            f"{', '.join(batch)}"
        )
    labels = labels.to(logits.device)
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return nn.functional.cross_entropy(logits.flatten(0, -2).float(), labels.flatten())
