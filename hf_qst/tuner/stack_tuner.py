"""What methods share that wrap a model's whole decoder stack: the PEFT layer in its place, and the tuner around it.

State lives on the layer and not on the tuner, because `generate`, TRL's fused head and transformers' own `add_adapter`
never call the tuner's forward.
"""

from __future__ import annotations

import inspect
import logging
import re

import torch
from torch import nn

from hf_qst.base_model.block_calls import by_name
from hf_qst.base_model.decoder_stack import DecoderStack, find_decoder_stack
from hf_qst.planning.announcement import Announcement
from hf_qst.tuner.manifest_tuner import ManifestLayer, ManifestTuner

logger = logging.getLogger(__name__)


class StackLayer(ManifestLayer):
    """Stands in the place of a decoder stack and holds a network for each adapter, one of which is in use at a time.

    Attributes the layer does not have are the stack's. Modules of a network name in `fixed_parameters` what is a
    parameter but never trained.
    """

    alone = "The model's decoder stack is wrapped by a method that cannot share it."
    base_trains = False
    """Whether the stack is in training mode when the model is; if not, only its embeddings are."""

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        self.hook_handles: list = []
        self._parameters_of_base = list(inspect.signature(type(base_layer).forward).parameters)[1:]
        # transformers 5.24 has renamed it.
        self.cache_argument = "cache" if "cache" in self._parameters_of_base else "past_key_values"

    def update_layer(self, adapter_name: str, network: nn.Module, inference_mode: bool) -> None:
        """Add a network under this name."""
        self.networks[adapter_name] = network
        self.set_adapter(self.active_adapters or [adapter_name], inference_mode=inference_mode)

    def _freeze_non_trainable_peft_weights(self, adapter_names=None) -> None:
        """PEFT calls this wherever it has made the parameters of an adapter trainable."""
        for module in self.networks.modules():
            for name in getattr(module, "fixed_parameters", ()):
                getattr(module, name).requires_grad_(False)

    def train(self, mode: bool = True):
        """Training mode for the networks. Unless `base_trains`, the stack stays in evaluation mode, without dropout, but
        for its embeddings: NEFTune's hook on them adds its noise in training mode."""
        super().train(mode)
        if not self.base_trains:
            self.base_layer.eval()
            self.base_layer.get_input_embeddings().train(mode)
        return self

    def remove_hooks(self) -> None:
        for handle in self.hook_handles:
            handle.remove()
        self.hook_handles = []

    def active_networks(self) -> dict[str, nn.Module]:
        """The networks in use by name; none while adapters are disabled."""
        if getattr(self, "_is_replica", False):
            # Replicas share the hooks and run in threads.
            raise RuntimeError(
                f"{self.method} does not run under nn.DataParallel; use one process a GPU (torchrun, accelerate launch)"
            )
        if self.disable_adapters:
            return {}
        return {name: self.checked(name) for name in self.active_adapters if name in self.networks}

    def active_network(self) -> nn.Module | None:
        """The network in use, or None while adapters are disabled or there are none."""
        active = self.active_networks()
        if len(active) > 1:
            raise ValueError(
                f"{self.method} runs one network at a time, but {list(active)} are active; call set_adapter(name)"
            )
        return next(iter(active.values()), None)

    def base_arguments(self, args: tuple, kwargs: dict) -> dict:
        """All arguments of the stack by name; without a cache in training, where transformers makes one unless told."""
        kwargs = {**by_name(self._parameters_of_base, args), **kwargs}
        given = next((kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None), None)
        if given is not None and 0 in given.shape[:2]:
            raise ValueError(
                f"{self.method} needs at least one row and one token, got a batch of shape {list(given.shape)}"
            )
        if kwargs.get("use_cache") is None:
            kwargs["use_cache"] = not torch.is_grad_enabled() and getattr(self.base_layer.config, "use_cache", False)
        return kwargs

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError(
            f"{self.method} cannot be merged into the base's weights. Keep it as an adapter (save_pretrained), or take the "
            "base back with unload()."
        )

    def unmerge(self) -> None:
        self.merge()  # which says why there is nothing to undo

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def __setattr__(self, name: str, value) -> None:
        # Assigning a child of the stack (resize_token_embeddings does) must reach the stack.
        base = self.__dict__.get("_modules", {}).get("base_layer")
        if base is not None and name in base._modules:
            setattr(base, name, value)
        else:
            super().__setattr__(name, value)


def with_last_hidden_state(output, hidden: torch.Tensor):
    """The stack's `output` (a model output or a tuple) with another last hidden state [batch, seq, hidden]."""
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    output.last_hidden_state = hidden
    if getattr(output, "hidden_states", None) is not None:
        # transformers' last entry is the stack's output, after the final norm.
        output.hidden_states = (*output.hidden_states[:-1], hidden)
    return output


class _ConfigsOfOneMethod(dict):
    """The `peft_config` of a model whose stack is wrapped: configurations by adapter name, of one method.

    PEFT and transformers enter every new adapter here before they touch the model.
    """

    def __init__(self, configs: dict, layer_class: type[StackLayer]):
        self.layer_class = layer_class
        super().__init__(configs)

    def __reduce__(self):
        return type(self), (dict(self), self.layer_class)

    def __setitem__(self, name: str, config) -> None:
        if config.peft_type != self.layer_class.method:
            raise ValueError(
                f"{self.layer_class.alone} The adapter {name!r} of type {str(config.peft_type.value)!r} cannot be added "
                "beside it. Call unload() first, or train and merge the other adapter before this one."
            )
        super().__setitem__(name, config)

    def update(self, configs: dict) -> None:
        for name, config in configs.items():
            self[name] = config


class StackTuner(ManifestTuner):
    """A PEFT tuner whose only layer is a `StackLayer`.

    Subclasses set `prefix`, `tuner_layer_cls` and make layer and network in `_make_layer` and `_make_network`. A network
    has a method `cast(dtype)`, which puts all its parameters into that dtype for good.
    """

    tuner_layer_cls = StackLayer

    def __init__(self, model, peft_config, adapter_name: str, **kwargs):
        super().__init__(model, peft_config, adapter_name, **kwargs)
        if not isinstance(self.peft_config, _ConfigsOfOneMethod):
            self.peft_config = _ConfigsOfOneMethod(self.peft_config, self.tuner_layer_cls)
        self.model.peft_config = self.peft_config

    @property
    def stack_layer(self) -> StackLayer:
        """The layer in the stack's place."""
        return next(iter(self._layers().values()))

    def _take_out(self, adapter_name: str, path: str, layer: StackLayer, stays: bool) -> None:
        if not stays:
            layer.remove_hooks()
        super()._take_out(adapter_name, path, layer, stays)

    def _prepare_adapter_config(self, peft_config, model_config):
        stack = find_decoder_stack(self.model)
        self._check_base(peft_config)
        self._check_stack(peft_config, stack)
        peft_config.target_modules = {stack.path}
        dropout = _dropout_rates(stack.module.config)
        if dropout and not peft_config.inference_mode:
            trains = self.tuner_layer_cls.base_trains
            logger.warning(
                "%s runs the base in training mode while it learns: its %s acts; load it with 0.0 to learn without"
                if trains
                else "%s runs the base in evaluation mode, also while training: its %s has no effect in it",
                self.tuner_layer_cls.method,
                ", ".join(f"{name}={rate}" for name, rate in dropout.items()),
            )
        return peft_config

    def _check_stack(self, peft_config, stack: DecoderStack) -> None:
        """Raise if this configuration cannot be applied to this model; nothing has been changed yet."""

    @staticmethod
    def _check_target_module_exists(peft_config, key: str) -> bool:
        return key in peft_config.target_modules

    def _make_network(self, peft_config, stack: DecoderStack) -> nn.Module:
        raise NotImplementedError

    def _make_layer(self, target: nn.Module, stack: DecoderStack) -> StackLayer:
        """The layer around the stack `target`, with its hooks."""
        return self.tuner_layer_cls(target, stack)

    def _start(self, peft_config, adapter_name: str, twin: nn.Module | None) -> None:
        """Finish a new network in its place. `twin` is the network of an adapter that was made of the same object.

        TRL copies an adapter so, for a reference: another of its configuration, then parameters by name.
        """

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        stack = find_decoder_stack(self.model)
        network = self._make_network(peft_config, stack)
        layer = target
        if not isinstance(target, self.tuner_layer_cls):
            layer = self._make_layer(target, stack)
            # Before hooks of a method that change the arguments.
            said = self.model.register_forward_pre_hook(Announcement(), prepend=True, with_kwargs=True)
            layer.hook_handles.append(said)
            self._replace_module(parent, target_name, layer, target)
        same = (name for name, config in self.peft_config.items() if config is peft_config and name in layer.networks)
        twin = next((layer.networks[name] for name in same if name != adapter_name), None)
        layer.update_layer(adapter_name, network, peft_config.inference_mode)
        layer.expect(adapter_name, peft_config, current_key)
        layer.train(self.model.training)
        self._start(peft_config, adapter_name, twin)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """PEFT's rule: an adapter is float32, or with `autocast_adapter_dtype=False` of the base's dtype."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            layer = self.stack_layer
            dtype = next(p.dtype for p in layer.base_layer.parameters() if p.is_floating_point())
            layer.networks[adapter_name].cast(dtype)

    def _unload_and_optionally_merge(self, merge=True, **kwargs):
        if merge:
            self.stack_layer.merge()
        for layer in self._layers().values():
            layer.remove_hooks()
        return super()._unload_and_optionally_merge(merge=False, **kwargs)


def _dropout_rates(config) -> dict[str, float]:
    """Rates of dropout and layer drop in the blocks by the names of a transformers config; those of heads are not."""
    rates = {name: value for name, value in vars(config).items() if re.search("drop(out)?$", name)}
    in_heads = ("classifier_", "summary_")
    return {
        name: rate
        for name, rate in rates.items()
        if isinstance(rate, float) and rate > 0 and not name.startswith(in_heads)
    }
