"""Several side networks trained on the same batches: one pass of the base, then head and loss for each in turn.

A model's forward runs from its first hook to its last as for one side network, with the base in it. Then it runs again for
each other one, where the stack returns the mix of that network without running. So every network has the loss of training
it alone, whatever the model's head and loss are, and the sum of the losses has in each network's parameters the gradient of
its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from hf_qst.tuner.stack_tuner import with_last_hidden_state


class InTurn:
    """Runs a model for each of the active side networks of a layer.

    Args:
        layer ([`QSTLayer`])
    """

    def __init__(self, layer: nn.Module):
        self.layer = layer
        self.is_on = False
        """Whether several active networks learn apart, each from its own loss; otherwise they are averaged."""
        self.turn: str | None = None
        self.losses: dict[str, torch.Tensor] = {}
        """Of the last call, by adapter."""
        self.rows = 0
        """Number of its rows."""
        self.is_summed = False
        """Whether its losses were divided by the number of labels of a whole step."""
        self._call: tuple[tuple, dict] | None = None
        self._kept: tuple | None = None
        self._goes_on = False

    def __getstate__(self):
        return {**vars(self), "losses": {}, "_call": None, "_kept": None, "turn": None}

    @property
    def runs(self) -> bool:
        """Whether the running call of the stack is for one of several networks."""
        return self.is_on and bool(self.layer.active_networks()) and self.layer.requested.current is None

    def install(self, model: nn.Module, between: list) -> list:
        """Register the hooks on `model`, around those that `between` registers when it is called; returns all handles."""
        return [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            *between(),
            model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]

    def output(self, args: tuple, kwargs: dict):
        """The stack's output for the network whose turn it is."""
        if self.turn is None:
            raise ValueError(f"{self._names()} learn apart, each from a loss of its own: call the model with labels")
        if self._kept is None:
            kwargs = self.layer.base_arguments(args, kwargs)
            if kwargs.get("past_key_values") is not None:
                raise ValueError(f"{self._names()} learn apart, without past_key_values")
            kwargs["use_cache"] = False
            running, output = self.layer.run_base([(name, None) for name in self.layer.active_networks()], kwargs)
            self._kept = running, output, output[0]
        running, output, frozen = self._kept
        reader = next(reader for reader in running.readers if reader.name == self.turn)
        output = output if isinstance(output, tuple) else type(output)(**output)
        return with_last_hidden_state(output, reader.mixed(frozen))

    def _names(self) -> str:
        return f"the QST adapters {', '.join(map(repr, self.layer.active_adapters))}"

    def _before(self, model, args, kwargs):
        if self._goes_on or not self.runs:
            return
        if kwargs.get("labels") is None:
            raise ValueError(
                f"{self._names()} learn apart, each from a loss of its own: call the model with labels, which Trainer does "
                "without label smoothing and compute_loss_func. To run them, set_adapter(name)"
            )
        self.turn = next(iter(self.layer.active_networks()))
        self._call = args, dict(kwargs)

    def _after(self, model, args, kwargs, output):
        if self._goes_on or self._call is None:
            return None
        call, self._call, self._goes_on = self._call, None, True
        try:
            if output is None:  # the forward failed
                return None
            outputs = {self.turn: output}
            for name in list(self.layer.active_networks())[1:]:
                self.turn = name
                with active_modules(model, name):
                    outputs[name] = model(*call[0], **call[1])
            return self._together(outputs, call[1])
        finally:
            self.turn, self._kept, self._goes_on = None, None, False

    def _together(self, outputs: dict, kwargs: dict):
        """One output of all networks: the sum of the losses, and tuples of what else each has of its own."""
        first = next(iter(outputs.values()))
        if getattr(first, "loss", None) is None:
            raise ValueError(
                f"{self._names()} learn apart, each from a loss of its own, but {type(first).__name__} has none: the loss "
                "must be computed by the model (Trainer, not SFTTrainer, and return_dict=True)"
            )
        self.losses = {name: output.loss.detach() for name, output in outputs.items()}
        self.rows, self.is_summed = len(kwargs["labels"]), kwargs.get("num_items_in_batch") is not None
        values = {"loss": torch.stack([output.loss for output in outputs.values()]).sum()}
        if first.get("logits") is not None:
            values["logits"] = tuple(output.logits for output in outputs.values())
        return type(first)(**values)


@contextmanager
def active_modules(model: nn.Module, name: str) -> Iterator[None]:
    """The fully trained modules (`modules_to_save`) of adapter `name` in use, without a change of what is trainable."""
    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    before = [wrapper.active_adapters for wrapper in wrappers]
    try:
        for wrapper in wrappers:
            # Not the method of its class, which freezes the adapter that was active.
            AuxiliaryTrainingWrapper.set_adapter(wrapper, [name] if name in wrapper._adapters else [])
        yield
    finally:
        for wrapper, names in zip(wrappers, before, strict=True):
            AuxiliaryTrainingWrapper.set_adapter(wrapper, list(names))
