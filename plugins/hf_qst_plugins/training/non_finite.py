"""Stops a training run at the first loss or gradient that is not finite, before the weights change, and names the module."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_qst.tuner.config import is_count


class NonFiniteCallback(TrainerCallback):
    """Ends training with an error at the first step whose loss or gradient is NaN or infinite.

        trainer.add_callback(NonFiniteCallback())

    The weights are still those of the step before. A step costs one look at the gradients. Only when something is found,
    the last batch is run again, to find where it begins. With float16 the loss scaler meets infinite gradients while it
    looks for a scale, and skips those steps; so many in a row are let pass.

    Args:
        skipped (`int`): steps in a row that a loss scaler may skip.

    Raises:
        FloatingPointError: in training, naming the step, the module and the last checkpoint.
        ValueError: `skipped` is not an integer of at least 0.
    """

    def __init__(self, skipped: int = 20):
        if not is_count(skipped, least=0):
            raise ValueError(f"skipped must be an integer >= 0, got {skipped!r}")
        self.skipped = skipped
        self._in_a_row = 0
        self._batch: tuple[tuple, dict] = (), {}
        self._finite: torch.Tensor | None = None
        self._hooks: list = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.on_train_end()

        def keep(module, arguments, named):
            if module.training:
                self._batch = arguments, named

        def look(module, arguments, outputs):
            loss = getattr(outputs, "loss", None)
            if loss is not None and module.training:
                finite = torch.isfinite(loss.detach()).all()
                self._finite = finite if self._finite is None else self._finite & finite

        self._hooks = [model.register_forward_pre_hook(keep, with_kwargs=True), model.register_forward_hook(look)]

    def on_train_end(self, *_, **__):
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._batch, self._finite, self._in_a_row = [], ((), {}), None, 0

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        loss_finite = self._finite is None or bool(self._finite)
        self._finite = None
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if loss_finite and all(torch.isfinite(gradient).all() for gradient in gradients):
            self._in_a_row = 0
            return
        self._in_a_row += 1
        if loss_finite and getattr(optimizer, "scaler", None) is not None and self._in_a_row <= self.skipped:
            return
        what = "gradient" if loss_finite else "loss"
        arguments, named = self._batch
        where = find_non_finite(model, *arguments, **named) if arguments or named else None
        last = get_last_checkpoint(args.output_dir)
        raise FloatingPointError(
            f"the {what} of step {state.global_step + 1} is NaN or infinite: "
            f"{where or 'not in the last batch of the step, when it is run again'}. The weights are those of the step "
            f"before. {'There is no checkpoint yet.' if last is None else f'The last checkpoint is {last}.'}"
        )


def find_non_finite(model: nn.Module, *arguments, **named) -> str | None:
    """Where NaN or infinity begins when a batch is run through `model`, and back if it gives a loss; None if nowhere.

    A module is named whose inputs are finite and whose outputs, or input gradients, are not; or the first parameter whose
    value or gradient is not finite.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not _finite(tensor):
            return f"the weights of {name} are not finite"
    found: list[str] = []
    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_hook(_watch(found, "the output of", name), with_kwargs=True))
    try:
        with torch.enable_grad():
            outputs = model(*arguments, **named)
        loss = getattr(outputs, "loss", None)
        if not found and loss is not None and loss.requires_grad:
            _watch_backward(model, found, hooks)
            with torch.enable_grad():
                model(*arguments, **named).loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _watch(found: list[str], what: str, name: str):
    def look(module, arguments, named, outputs):
        if not found and all(map(_finite, _tensors((arguments, named)))) and not all(map(_finite, _tensors(outputs))):
            found.append(f"{what} {name or 'the model'} ({type(module).__name__}) is the first that is not finite")

    return look


def _watch_backward(model: nn.Module, found: list[str], hooks: list) -> None:
    def look_at(name: str):
        def look(gradient):
            if not found and not _finite(gradient):
                found.append(f"the gradient of {name} is the first that is not finite")

        return look

    hooks += [p.register_hook(look_at(name)) for name, p in model.named_parameters() if p.requires_grad]


def _tensors(value) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (tensor for part in value.values() for tensor in _tensors(part))
    elif isinstance(value, (list, tuple)):
        yield from (tensor for part in value for tensor in _tensors(part))


def _finite(tensor: torch.Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex()) or bool(torch.isfinite(tensor).all())
