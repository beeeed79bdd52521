"""Trains several side networks on the same batches with one pass of the base a step, in an ordinary Trainer.

The model returns the sum of the losses, whose gradient in each network is that of its own loss. What a Trainer does to all
gradients together, clipping, is done here for each network by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_qst.qst import InTurn, learn_apart
from hf_qst.tuner.config import is_number


def train_together(
    trainer: Trainer, adapters: Sequence[str] | None = None, learning_rates: Mapping[str, float] | None = None
) -> None:
    """
    Make a Trainer train several QST adapters at once, each as if it were trained alone.

        trainer = Trainer(model, arguments, train_dataset=data)
        train_together(trainer, learning_rates={"slow": 1e-4, "fast": 1e-3})
        trainer.train()
        model.save_pretrained(folder)       # folder/slow, folder/fast

    A step runs the base once, and side network, head and loss once for each adapter. Gradients are clipped to
    `max_grad_norm` for each adapter by itself. With dropout 0 the weights are those of training each adapter alone, to the
    last bit; dropout draws another sequence of random numbers.

    The Trainer's log has `<adapter>_loss` and `eval_<adapter>_loss`; its own `loss` and `eval_loss` are sums over the
    adapters, and `grad_norm` is of all gradients before they are clipped. Predictions are a tuple with those of each
    adapter. Afterwards the adapters stay active together; `set_adapter(name)` chooses one.

    Args:
        trainer ([`~transformers.Trainer`]): whose model has the adapters, and computes their loss itself.
        adapters (`list[str]`, *optional*): which to train; without it, all.
        learning_rates (`dict[str, float]`, *optional*): for those that differ from the Trainer's `learning_rate`.

    Raises:
        ValueError: no such adapter, one with a tail or used for inference only, or a Trainer that cannot treat the adapters
            apart.
    """
    rates = dict(learning_rates or {})
    trained = getattr(trainer.model, "peft_config", {}) if adapters is None else adapters
    if wrong := [name for name, rate in rates.items() if name not in trained or not is_number(rate) or rate < 0]:
        raise ValueError(
            f"learning_rates must be numbers >= 0 for adapters that are trained, got {wrong[0]!r}: {rates[wrong[0]]!r}"
        )
    _check_trainer(trainer, rates)
    apart = learn_apart(trainer.model, adapters)
    own = {id(p) for name in apart.names for p in apart.parameters(name)}
    if others := [path for path, p in trainer.model.named_parameters() if p.requires_grad and id(p) not in own]:
        raise ValueError(f"train_together trains adapters and nothing else, but {others[0]!r} is trainable")
    if trainer.optimizer is None:
        _split_groups(trainer.create_optimizer(), apart, rates)
    trainer.add_callback(_Together(trainer, apart))


def _check_trainer(trainer: Trainer, rates: Mapping[str, float]) -> None:
    args = trainer.args
    refused = {
        "label_smoothing_factor": (args.label_smoothing_factor, "the Trainer would compute one loss from all logits"),
        "compute_loss_func": (trainer.compute_loss_func, "the Trainer would compute one loss from all logits"),
        "load_best_model_at_end": (args.load_best_model_at_end, "each adapter has a best step of its own"),
        "fp16": (args.fp16, "its scale of the loss is one for all adapters: use bf16"),
        "deepspeed": (trainer.is_deepspeed_enabled, "it clips all gradients together"),
        "fsdp": (trainer.is_fsdp_enabled, "it clips all gradients together"),
        "optimizers": (
            trainer.optimizer is not None and bool(rates),
            "learning_rates are for the Trainer's own optimizer, give yours parameter groups",
        ),
    }
    for name, (value, reason) in refused.items():
        if value:
            raise ValueError(f"train_together does not support a Trainer with {name}: {reason}")


def _split_groups(optimizer, apart: InTurn, rates: Mapping[str, float]) -> None:
    """Give each adapter parameter groups of its own."""
    groups = []
    for name in apart.names:
        own = {id(p) for p in apart.parameters(name)}
        parts = [(group, [p for p in group["params"] if id(p) in own]) for group in optimizer.param_groups]
        groups += [{**group, "params": part, "lr": rates.get(name, group["lr"])} for group, part in parts if part]
    optimizer.param_groups = groups


class _Together(TrainerCallback):
    def __init__(self, trainer: Trainer, apart: InTurn):
        self.trainer, self.apart, self.names = trainer, apart, list(apart.names)
        self._max_norm = 0.0
        self._sums: dict[str, torch.Tensor] = {}
        self._logged_at = 0
        self._evaluated: list[tuple[int, dict[str, torch.Tensor]]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        # Loading a checkpoint to resume from leaves one adapter active.
        learn_apart(self.trainer.model, self.names)
        self._max_norm, args.max_grad_norm = args.max_grad_norm, 0.0
        self._sums, self._logged_at = {}, state.global_step

    def on_train_end(self, args, state, control, **kwargs):
        args.max_grad_norm = self._max_norm

    def _collect(self) -> None:
        parts = 1 if self.apart.is_summed else self.trainer.current_gradient_accumulation_steps
        for name, loss in self.apart.losses.items():
            self._sums[name] = self._sums.get(name, 0) + loss / parts

    def on_substep_end(self, args, state, control, **kwargs):
        self._collect()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for name in self.names if self._max_norm > 0 else ():
            nn.utils.clip_grad_norm_(self.apart.parameters(name), self._max_norm)

    def on_step_end(self, args, state, control, **kwargs):
        self._collect()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in (logs or {}) or not self._sums:
            return
        steps = max(state.global_step - self._logged_at, 1)
        values = {f"{name}_loss": float(total) / steps for name, total in self._sums.items()}
        self._sums, self._logged_at = {}, state.global_step
        _add(logs, values, state)

    def on_prediction_step(self, args, state, control, **kwargs):
        self._evaluated.append((self.apart.rows, self.apart.losses))

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        key = next((key for key in metrics or {} if key.endswith("_loss")), None)
        evaluated, self._evaluated = self._evaluated, []
        if key is None or not evaluated:
            return
        rows = sum(count for count, _ in evaluated)
        values = {
            f"{key.removesuffix('loss')}{name}_loss": sum(count * float(losses[name]) for count, losses in evaluated)
            / rows
            for name in evaluated[0][1]
        }
        _add(metrics, values, state)

    def on_predict(self, args, state, control, metrics, **kwargs):
        self._evaluated = []


def _add(logs: dict, values: dict[str, float], state) -> None:
    """Add to what a Trainer has just logged."""
    logs.update(values)
    if state.log_history:
        state.log_history[-1].update(values)  # the Trainer added this entry before the event
