"""How much an error in a layer's output matters to the model's loss.

To second order a loss changes by half of E (g . dy)^2 when the output y of a layer changes by dy, with g the loss's
gradient there. For errors of no particular direction that is E||g||^2 E||dy||^2 / d_out: the Fisher information of the
output times the error's energy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_qst.base_model.linear_layers import dense_shape
from hf_qst.calibration import CalibrationError, calibration_mode, hooks
from hf_qst.calibration.labels import labelled_batches, own_loss, same_problem

LAYER_WEIGHTS = ("auto", "none", "fisher")
SENSITIVITY_TOKENS = 4096
"""Of the layer weight `"auto"`: one number a layer needs no more, and a token of it costs about three forward passes."""
USER = "layer_weight='fisher'"
"""As error messages call it."""


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
    labelled = labelled_batches(model, batches, USER)
    with calibration_mode(model), torch.enable_grad(), same_problem(model):
        for index, batch in tqdm(labelled, desc="sensitivity", unit="batch", disable=not progress):
            for name, energy in _output_gradients(model, list(energies), batch, index).items():
                gradients[name] += energy
    return relative_weights(model, gradients, energies)


def relative_weights(
    model: nn.Module, gradients: Mapping[str, float], energies: Mapping[str, float]
) -> dict[str, float]:
    """The weights of `fisher_weights` from the sum over rows of ||g||^2, by layer name."""
    # It is the number of rows times E||g||^2.
    raw = {name: gradients[name] / dense_shape(model.get_submodule(name))[1] * energies[name] for name in energies}
    mean = sum(raw.values()) / len(raw)
    if not 0 < mean < float("inf"):
        raise CalibrationError(f"{USER}: the loss on calibration_data has no finite gradient")
    return {name: value / mean for name, value in raw.items()}


def _output_gradients(model: nn.Module, names: Sequence[str], batch: Mapping, index: int) -> dict[str, float]:
    """Sum over rows of the squared gradient of the batch's loss at each layer's output, over all of its calls."""
    with outputs_of(model, names) as outputs:
        loss = own_loss(model, batch, index, USER)
    try:
        gradients = torch.autograd.grad(loss, [output for _, output in outputs], allow_unused=True)
    except RuntimeError as error:
        raise CalibrationError(f"{USER}: batch {index} gives no gradient at a layer's output ({error})") from error
    if all(gradient is None for gradient in gradients):
        raise CalibrationError(f"{USER}: the loss on batch {index} does not depend on any target")
    total = dict.fromkeys(names, 0.0)
    add_energies(total, outputs, gradients)
    return total


def add_energies(
    total: dict[str, float], outputs: Sequence[tuple[str, torch.Tensor]], gradients: Sequence[torch.Tensor | None]
) -> None:
    """Add to `total`, by layer name, the sum over rows of the squared gradient at each of these outputs."""
    for (name, _), gradient in zip(outputs, gradients, strict=True):
        # A layer may run and its output not be used, as that of the last vision layers in some multimodal models.
        total[name] += 0.0 if gradient is None else gradient.double().square().sum().item()


@contextmanager
def outputs_of(model: nn.Module, names: Iterable[str]) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """What layers give meanwhile, with their names, in the order of their calls: tensors with a gradient."""
    outputs: list[tuple[str, torch.Tensor]] = []

    def keep(name: str):
        def hook(module, args, output):
            # Behind frozen weights an output has no graph; from here on there is one.
            output = output if output.requires_grad else output.detach().requires_grad_()
            outputs.append((name, output))
            return output

        return hook

    with hooks(model.get_submodule(name).register_forward_hook(keep(name)) for name in names):
        yield outputs
