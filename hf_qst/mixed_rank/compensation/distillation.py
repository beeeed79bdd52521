"""Factors trained to bring a compressed model's predictions closer to the dense one's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_qst.calibration import calibration_mode
from hf_qst.mixed_rank.calibration_set import CalibrationSet
from hf_qst.mixed_rank.predictions import Predictor, divergence, installed, mean_divergence, row_count

PASSES = 20
LEARNING_RATE = 1e-4
HELD_OUT = 0.1
_WARM_UP = 0.05
# Training stops when so many looks at the held-out batches, one after each pass over the others, brought nothing.
_PATIENCE = 4


def distil(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    training: CalibrationSet,
    held_out: CalibrationSet,
    settings,
) -> dict[str, float]:
    """Train the parameters of all modules together on the predictions of the model they are made for; in place.

    AdamW minimises the divergence (`hf_qst.mixed_rank.predictions`) of the model with the modules from the model without
    them, one batch a step, with linear warm-up and decay. What was best on the held-out batches is kept, the start
    included, so that nothing gets worse there; training stops when several passes brought nothing.

    Args:
        model: the dense model; left as it is.
        modules: what stands in the place of its own modules, by name; trained in float32.
        training: model inputs.
        held_out: model inputs that the modules have not seen.
        settings ([`MixedRankConfig`]): with the most steps, the learning rate, and the seed of the order of batches.

    Returns:
        Divergence on the held-out batches before and after, and the number of steps taken.
    """
    batches, compensation = training.batches, settings.compensation
    steps = compensation.steps or PASSES * len(batches)
    predictor = Predictor(model, [*batches, *held_out.batches])
    with _trainable(modules) as parameters, calibration_mode(model):
        optimizer = torch.optim.AdamW(parameters, lr=compensation.lr or LEARNING_RATE, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_up_and_decay(steps))
        order = _passes(len(batches), torch.Generator().manual_seed(settings.seed))
        best = _Best(parameters, lambda: mean_divergence(model, model, modules, held_out.batches, predictor))
        with tqdm(total=steps, desc="distillation", unit="step", disable=not training.progress) as bar:
            for step in range(1, steps + 1):
                if _has_gradients(model, modules, parameters, batches[next(order)], predictor):
                    optimizer.step()
                schedule.step()
                bar.update()
                if step % len(batches) == 0 or step == steps:
                    bar.set_postfix(held_out=f"{best.look():.4f}", best=f"{best.least:.4f}")
                if best.waited == _PATIENCE:
                    break
        best.restore()
    return {"before": best.start, "after": best.least, "steps": step}


class _Best:
    """The values of parameters where `measure` was least so far, their first ones included."""

    def __init__(self, parameters: Sequence[nn.Parameter], measure: Callable[[], float]):
        self.parameters, self.measure = parameters, measure
        self.start = self.least = measure()
        self.waited = 0
        self._keep()

    def _keep(self) -> None:
        self.kept = [parameter.detach().clone() for parameter in self.parameters]

    def look(self) -> float:
        value = self.measure()
        self.waited = 0 if value < self.least else self.waited + 1
        if value < self.least:
            self.least = value
            self._keep()
        return value

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, value in zip(self.parameters, self.kept, strict=True):
            parameter.copy_(value)


@contextmanager
def _trainable(modules: Mapping[str, nn.Module]) -> Iterator[list[nn.Parameter]]:
    """The parameters of modules, in float32 and with gradients for a while."""
    before = [(module, [(p.dtype, p.requires_grad) for p in module.parameters()]) for module in modules.values()]
    yield [p for module in modules.values() for p in module.float().requires_grad_().parameters()]
    for module, states in before:
        module.to(states[0][0])
        for parameter, (_, wanted) in zip(module.parameters(), states, strict=True):
            parameter.grad = None
            parameter.requires_grad_(wanted)


def _warm_up_and_decay(steps: int) -> Callable[[int], float]:
    warm_up = max(1, int(_WARM_UP * steps))
    return lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))


def _passes(count: int, generator: torch.Generator) -> Iterator[int]:
    """Numbers of batches, each pass in an order of its own."""
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def _has_gradients(
    model: nn.Module, modules: Mapping, parameters: list[nn.Parameter], batch: Mapping, predictor: Predictor
) -> bool:
    """Whether the batch has rows to learn from; then the parameters have their gradients."""
    expected = predictor(model, batch)
    if not row_count(expected):
        return False
    with torch.enable_grad(), installed(model, modules):
        loss = divergence(expected, predictor(model, batch))
        # Asked for by name: the model's own parameters get no gradients. A layer's output may not be used.
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
    return True
