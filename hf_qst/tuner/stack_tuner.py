"""What methods share that wrap a model's whole decoder stack: the PEFT layer in its place, and the tuner around it.

State lives on the layer and not on the tuner, because `generate`, TRL's fused head and transformers' own `add_adapter`
never call the tuner's forward.
"""

from __future__ import annotations

import inspect
import logging
import re
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from hf_qst.base_model.decoder_stack import DecoderStack, find_decoder_stack
from hf_qst.saved import manifest

logger = logging.getLogger(__name__)


class StackLayer(nn.Module, BaseTunerLayer):
    """Stands in the place of a decoder stack and holds a network for each adapter, one of which is in use at a time.

    Subclasses name the `ModuleDict` of networks as the only entry of `adapter_layer_names`. Attributes the layer does
    not have are the stack's. Modules of a network name in `fixed_parameters` what is a parameter but never trained.
    """

    other_param_names = ()
    method: str
    """What error messages call the method; the value of its PEFT type."""
    alone: str = "The model's decoder stack is wrapped by a method that cannot share it."
    """A sentence that says why the model cannot have adapters of another method."""
    base_trains = False
    """Whether the stack is in training mode when the model is; if not, only its embeddings are."""

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        setattr(self, self.adapter_layer_names[0], nn.ModuleDict())
        self.merged_adapters = []
        self._disable_adapters = False
        self._active_adapter = []
        # By adapter name: manifests of networks that were not loaded yet, and what was found wrong when they were.
        self.unchecked: dict[str, dict | None] = {}
        self.damage: dict[str, manifest.CheckpointError] = {}
        self.hook_handles: list = []
        self._parameters_of_base = list(inspect.signature(type(base_layer).forward).parameters)[1:]

    @property
    def networks(self) -> nn.ModuleDict:
        return getattr(self, self.adapter_layer_names[0])

    def update_layer(self, adapter_name: str, network: nn.Module, inference_mode: bool) -> None:
        """Add a network under this name.

        Raises:
            ValueError: a part of the network has this name: PEFT finds the tensors of other adapters by names in keys.
        """
        if adapter_name in {part for name, _ in network.named_parameters() for part in name.split(".")}:
            raise ValueError(
                f"adapter_name must be none of the names of {self.method}'s own modules, got {adapter_name!r}: PEFT would "
                "leave tensors of other adapters out when it saves them"
            )
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

    def active_network(self) -> nn.Module | None:
        """The network in use, or None while adapters are disabled or there are none."""
        if getattr(self, "_is_replica", False):
            # Replicas share the hooks and run in threads.
            raise RuntimeError(
                f"{self.method} does not run under nn.DataParallel; use one process a GPU (torchrun, accelerate launch)"
            )
        if self.disable_adapters:
            return None
        names = [name for name in self.active_adapters if name in self.networks]
        if len(names) > 1:
            raise ValueError(
                f"{self.method} runs one network at a time, but {names} are active; call set_adapter(name)"
            )
        return self._checked(names[0]) if names else None

    def _checked(self, name: str) -> nn.Module:
        """The network of this name.

        Raises:
            CheckpointError: what transformers' own loader put into it is not what was saved.
        """
        if self.unchecked.get(name) is not None:
            self._check_loaded(name)
        if (damage := self.damage.get(name)) is not None:
            raise damage
        return self.networks[name]

    def requires_grad_(self, requires_grad: bool = True):
        """transformers' loader calls this on an adapter that it has loaded for inference: the moment to check it.

        It calls nothing on one that was loaded for training, which is checked when it first runs.
        """
        super().requires_grad_(requires_grad)
        for name in self.networks:
            if self.unchecked.get(name) is not None:
                self._check_loaded(name)
        return self

    @torch.compiler.disable
    def _check_loaded(self, name: str) -> None:
        try:
            checked = manifest.check_in_memory(self.unchecked[name], self.networks[name])
        except manifest.CheckpointError as error:
            self.damage[name], checked = error, True
        if checked:
            self.unchecked[name] = None

    def base_arguments(self, args: tuple, kwargs: dict) -> dict:
        """All arguments of the stack by name; without a cache in training, where transformers makes one unless told."""
        kwargs = {**dict(zip(self._parameters_of_base, args, strict=False)), **kwargs}
        if kwargs.get("use_cache") is None:
            kwargs["use_cache"] = not torch.is_grad_enabled() and getattr(self.base_layer.config, "use_cache", False)
        return kwargs

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError(f"{self.method} cannot be merged in place")

    def unmerge(self) -> None:
        raise NotImplementedError(f"{self.method} cannot be unmerged")

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


class StackTuner(BaseTuner):
    """A PEFT tuner whose only layer is a `StackLayer`, with a manifest of what it saves.

    Subclasses set `prefix`, `tuner_layer_cls` and make the layer in `_create_and_replace`.
    """

    tuner_layer_cls = StackLayer
    target_module_mapping = {}

    def __init__(self, model, peft_config, adapter_name: str, **kwargs):
        super().__init__(model, peft_config, adapter_name, **kwargs)
        if not isinstance(self.peft_config, _ConfigsOfOneMethod):
            self.peft_config = _ConfigsOfOneMethod(self.peft_config, self.tuner_layer_cls)
        self.model.peft_config = self.peft_config

    def inject_adapter(self, model, adapter_name: str, *args, **kwargs) -> None:
        before = set(self._layers().values())
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            # The name of a refused adapter stays free, also where the dictionary is that of another method's adapters.
            self.peft_config.pop(adapter_name, None)
            self._remove_network(adapter_name, before)
            raise

    def _layers(self) -> dict[str, StackLayer]:
        return {path: m for path, m in self.model.named_modules() if isinstance(m, self.tuner_layer_cls)}

    def _remove_network(self, adapter_name: str, before: set[StackLayer]) -> None:
        """Take the network of an adapter out, and the layer that was made for it unless it was there `before`."""
        for path, layer in self._layers().items():
            if adapter_name in layer.networks:
                del layer.networks[adapter_name]
            if layer not in before:
                layer.remove_hooks()
                parent, _, name = path.rpartition(".")
                setattr(self.model.get_submodule(parent), name, layer.base_layer)

    def _prepare_adapter_config(self, peft_config, model_config):
        stack = find_decoder_stack(self.model)
        self._check_stack(peft_config, stack)
        if peft_config.manifest is not None:
            manifest.check_base(peft_config.manifest, base_signature(stack))
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

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        if kwargs.get("adapter_names") is not None:
            method = self.tuner_layer_cls.method
            raise NotImplementedError(
                f"{method} runs one network for a whole batch and cannot mix adapter_names in it; "
                "call set_adapter(name)"
            )
        yield

    def _unload_and_optionally_merge(self, merge=True, **kwargs):
        if merge:
            self._check_merge_allowed()
        for module in self.model.modules():
            if isinstance(module, StackLayer):
                module.remove_hooks()
        return super()._unload_and_optionally_merge(merge=False, **kwargs)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        container = cls.tuner_layer_cls.adapter_layer_names[0]
        key = key.replace(f"{container}.{adapter_name}.", f"{container}.", 1)
        # PEFT names a fully trained module's tensor twice when it also saves the embedding layers.
        return key.replace(f".modules_to_save.{adapter_name}.", ".", 1)

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        names = {key: cls._remove_adapter_name_from_key(key, adapter_name) for key in tensors}
        base = base_signature(find_decoder_stack(with_head(model)))
        saved = {names[key]: value for key, value in tensors.items()}
        manifest.remember(config, {**saved, **_trained_modules(model, adapter_name, state_dict)}, base)
        return tensors

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        if config.manifest is not None:
            expected = {_without_wrapper(key): entry for key, entry in config.manifest["tensors"].items()}
            found = {_without_wrapper(key): tensor for key, tensor in state_dict.items()}
            manifest.check({**config.manifest, "tensors": expected}, found)
        # PEFT has entered a trained module's tensors under this adapter's name; files of version 0.1 may hold them a
        # second time, under the name of the adapter that was saved, which may be another one of this model.
        own = f".modules_to_save.{adapter_name}."
        state_dict = {key: tensor for key, tensor in state_dict.items() if own in key or _without_wrapper(key) == key}
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _dropout_rates(config) -> dict[str, float]:
    """Rates of dropout and layer drop in the blocks by the names of a transformers config; those of heads are not."""
    rates = {name: value for name, value in vars(config).items() if re.search("drop(out)?$", name)}
    in_heads = ("classifier_", "summary_")
    return {
        name: rate
        for name, rate in rates.items()
        if isinstance(rate, float) and rate > 0 and not name.startswith(in_heads)
    }


def _without_wrapper(key: str) -> str:
    """A tensor's name without PEFT's wrapper of a fully trained module and the adapter's name in it."""
    return re.sub(r"\.modules_to_save\.[^.]+\.", ".", key, count=1)


def with_head(model: nn.Module) -> nn.Module:
    """The transformers model itself, whether or not PEFT wraps it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _trained_modules(model: nn.Module, adapter_name: str, state_dict: dict) -> dict[str, torch.Tensor]:
    """Tensors of `modules_to_save`, as PEFT is about to add them to the network's."""
    tensors = {}
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            own = {k.removeprefix(f"{path}."): v for k, v in state_dict.items() if k.startswith(f"{path}.")}
            saved = module.adapter_state_dict(adapter_name, own)
            tensors.update({f"{path}.{key}": value for key, value in saved.items()})
    return tensors


def base_signature(stack: DecoderStack) -> dict:
    """What a network depends on in its base."""
    return {
        "model_type": stack.model_type,
        "hidden_size": stack.spec.hidden_size,
        "num_hidden_layers": len(stack.blocks),
        "output_size": stack.output_size,
    }
