"""Several side networks trained on the same batches: one pass of the base, then head and loss for each in turn.

A model's forward runs from its first hook to its last as for one side network, with the base in it. Then it runs again for
each other one, where the stack returns the mix of that network without running. So every network has the loss of training
it alone, whatever the model's head and loss are, and the sum of the losses has in each network's parameters the gradient of
its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft.tuners.tuners_utils import BaseTuner
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
        self.names: list[str] = []
        self.losses: dict[str, torch.Tensor] = {}
        """Of the last call, by adapter."""
        self.rows = 0
        """Number of its rows."""
        self.is_summed = False
        """Whether its losses were divided by the number of labels of a whole step."""
        self._model: nn.Module | None = None
        self._call: tuple[tuple, dict] | None = None
        self._kept: tuple | None = None
        self._goes_on = False

    def __getstate__(self):
        return {**vars(self), "losses": {}, "_call": None, "_kept": None, "turn": None}

    def start(self, model: nn.Module, names: list[str]) -> None:
        """Make these networks of `model` active and trainable, and let them learn apart."""
        self.layer.set_adapter(list(names))
        self.names, self._model = list(names), model
        for module in model.modules():
            if isinstance(module, BaseTuner):
                module.active_adapter = list(names)
        for wrapper in _wrappers(model):
            others = [name for name in wrapper._adapters if name not in names]
            wrapper.set_requires_grad(others, requires_grad=False)
            wrapper.set_requires_grad(names)
            _use(wrapper, names[0])
        self.is_on = True

    def stop(self, names: list[str]) -> None:
        """Only these networks are active from now on; PEFT freezes no fully trained module but that of one adapter."""
        if self.is_on:
            for wrapper in _wrappers(self._model):
                wrapper.set_requires_grad([name for name in self.names if name not in names], requires_grad=False)
        self.is_on = False

    def parameters(self, name: str) -> list[nn.Parameter]:
        """The trainable parameters of one adapter, in the order of the model's."""
        inside = (f".{self.layer.adapter_layer_names[0]}.{name}.", f".modules_to_save.{name}.")
        return [p for path, p in self._model.named_parameters() if p.requires_grad and any(i in path for i in inside)]

    @property
    def runs(self) -> bool:
        """Whether the running call of the stack is for one of several networks."""
        return self.is_on and bool(self.layer.active_networks()) and self.layer.requested.current is None

    def install(self, model: nn.Module, between: Callable[[], list]) -> list:
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
            if kwargs.get(self.layer.cache_argument) is not None:
                raise ValueError(f"{self._names()} learn apart, without {self.layer.cache_argument}")
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
                for wrapper in _wrappers(model):
                    _use(wrapper, name)
                outputs[name] = model(*call[0], **call[1])
            return self._together(outputs, call[1])
        finally:
            for wrapper in _wrappers(model):
                _use(wrapper, next(iter(self.layer.active_networks())))
            self.turn, self._kept, self._goes_on = None, None, False

    def _together(self, outputs: dict, kwargs: dict):
        """One output of all networks: the sum of the losses, and what else each has of its own."""
        first = next(iter(outputs.values()))
        if getattr(first, "loss", None) is None:
            raise ValueError(
                f"{self._names()} learn apart, each from a loss of its own, but the model returned none: its output must "
                "have a loss (return_dict=True)"
            )
        self.losses = {name: output.loss.detach() for name, output in outputs.items()}
        self.rows, self.is_summed = len(kwargs["labels"]), kwargs.get("num_items_in_batch") is not None
        values = {}
        if first.get("log_probs") is not None:
            # TRL's fused head: SFTTrainer sums over all rows and tokens, whosever they are.
            values = {name: value for name, value in first.items() if value.dim() == 0}
            rows = first.keys() - values.keys()
            values |= {name: torch.cat([output[name] for output in outputs.values()]) for name in rows}
        elif first.get("logits") is not None:
            values["logits"] = tuple(output.logits for output in outputs.values())
        return type(first)(**{**values, "loss": torch.stack([output.loss for output in outputs.values()]).sum()})


def _wrappers(model: nn.Module) -> list[AuxiliaryTrainingWrapper]:
    """The fully trained modules (`modules_to_save`)."""
    return [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]


def _use(wrapper: AuxiliaryTrainingWrapper, name: str) -> None:
    """Let a module compute with the weights of this adapter, or with the base's if it has none of it."""
    # Not the method of its class, which freezes the adapter that was active.
    AuxiliaryTrainingWrapper.set_adapter(wrapper, [name] if name in wrapper._adapters else [])
