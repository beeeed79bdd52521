"""What all PEFT methods share: files that are saved with a manifest and checked against it, refusals, clean failures."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from functools import cache

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from hf_qst.base_model.decoder_stack import UnsupportedArchitectureError, find_decoder_stack
from hf_qst.base_model.offloading import has_values, is_sharded
from hf_qst.saved import manifest

logger = logging.getLogger(__name__)


class ManifestLayer(nn.Module, BaseTunerLayer):
    """Holds the modules of a method's adapters by name, and checks those that transformers' own loader filled.

    Subclasses name the `ModuleDict` of these modules as the only entry of `adapter_layer_names`.
    """

    other_param_names = ()
    method: str
    """What error messages call the method."""
    alone: str
    """A sentence that says why the model cannot have adapters of another method."""

    def __init__(self, base_layer: nn.Module | None = None):
        super().__init__()
        if base_layer is not None:
            self.base_layer = base_layer
        setattr(self, self.adapter_layer_names[0], nn.ModuleDict())
        self.merged_adapters = []
        self._disable_adapters = False
        self._active_adapter = []
        # By adapter name: entries of the manifest of what was not loaded yet, and what was wrong when it was.
        self.unchecked: dict[str, dict[str, dict]] = {}
        self.damage: dict[str, manifest.CheckpointError] = {}

    @property
    def networks(self) -> nn.ModuleDict:
        return getattr(self, self.adapter_layer_names[0])

    def expect(self, adapter_name: str, config, path: str) -> None:
        """Note what an adapter's weights must be; `path` is the layer's in the base model."""
        if config.manifest is not None:
            container = f"{path}.{self.adapter_layer_names[0]}"
            self.unchecked[adapter_name] = manifest.entries_below(config.manifest, container)

    def checked(self, adapter_name: str) -> nn.Module:
        """The module of this adapter.

        Raises:
            CheckpointError: what transformers' own loader put into it is not what was saved.
        """
        if adapter_name in self.unchecked:
            self._check_loaded(adapter_name)
        if (damage := self.damage.get(adapter_name)) is not None:
            raise damage
        network = self.networks[adapter_name]
        learns = self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if learns and any(p.dtype == torch.float16 and p.requires_grad for p in network.parameters()):
            _warn_of_float16(self.method)
        return network

    def requires_grad_(self, requires_grad: bool = True):
        """transformers' loader calls this on an adapter that it has loaded for inference: the moment to check it.

        It calls nothing on one that was loaded for training, which is checked when it first runs.
        """
        super().requires_grad_(requires_grad)
        for name in list(self.unchecked):
            self._check_loaded(name)
        return self

    @torch.compiler.disable
    def _check_loaded(self, adapter_name: str) -> None:
        try:
            checked = manifest.check_in_memory(self.unchecked[adapter_name], self.networks[adapter_name])
        except manifest.CheckpointError as error:
            self.damage[adapter_name], checked = error, True
        if checked:
            del self.unchecked[adapter_name]


@cache
def _warn_of_float16(method: str) -> None:
    logger.warning(
        f"{method} trains weights in float16, in which AdamW's epsilon of 1e-8 is 0: the first step may give NaN. Load the "
        "model in bfloat16 or float32 to train it; autocast_adapter_dtype=True keeps an adapter beside its base in float32"
    )


class ManifestTuner(BaseTuner):
    """A PEFT tuner whose layers are `ManifestLayer`s.

    Subclasses set `prefix` and `tuner_layer_cls`, make the layers in `_create_and_replace`, and call `_check_base` from
    `_prepare_adapter_config` where weights will be loaded.
    """

    tuner_layer_cls = ManifestLayer
    target_module_mapping = {}

    @classmethod
    def _container(cls) -> str:
        return cls.tuner_layer_cls.adapter_layer_names[0]

    def _layers(self) -> dict[str, ManifestLayer]:
        return {path: m for path, m in self.model.named_modules() if isinstance(m, self.tuner_layer_cls)}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        """As of PEFT; an adapter that is refused leaves the model and the names of its adapters as they were."""
        before = set(self._layers().values())
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self._refuse_confusing_names()
        except Exception:
            # Also where transformers, and not PEFT, keeps the dictionary.
            self.peft_config.pop(adapter_name, None)
            for path, layer in self._layers().items():
                self._take_out(adapter_name, path, layer, layer in before)
            raise

    def _take_out(self, adapter_name: str, path: str, layer: ManifestLayer, stays: bool) -> None:
        """Undo what was done to one layer for an adapter; one that was made for it goes, unless it `stays`."""
        for held in (layer.networks, layer.unchecked):
            if adapter_name in held:
                del held[adapter_name]
        if not stays and hasattr(layer, "base_layer"):
            self.model.set_submodule(path, layer.base_layer)

    def _refuse_confusing_names(self) -> None:
        """PEFT finds the tensors of other adapters by names in keys, and would leave out what is called like one."""
        if len(self.peft_config) == 1:
            return
        inside = (f".{self._container()}.", ".modules_to_save.")
        names = [name for name, _ in self.model.named_modules() if not any(part in f".{name}." for part in inside)]
        own = {key for layer in self._layers().values() for net in layer.networks.values() for key in net.state_dict()}
        parts = {part for name in ("base_model.model", self._container(), *names, *own) for part in name.split(".")}
        if confusing := sorted(parts & self.peft_config.keys()):
            raise ValueError(
                f"adapter_name must be none of the names of the model's modules where there are several adapters, got "
                f"{confusing[0]!r}: PEFT would leave tensors of other adapters out when it saves them"
            )

    def _check_new_adapter_config(self, config) -> None:
        super()._check_new_adapter_config(config)
        for module in self.model.modules():
            if isinstance(module, BaseTunerLayer) and not isinstance(module, self.tuner_layer_cls):
                raise ValueError(
                    f"{self.tuner_layer_cls.alone} The model has adapters of type {type(module).__name__}: merge or "
                    "unload them first."
                )

    def _check_base(self, config) -> None:
        if config.manifest is not None:
            manifest.check_base(config.manifest, base_signature(self.model))

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        # PEFT's would give the base's weight to the new module.
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        if kwargs.get("adapter_names") is not None:
            raise NotImplementedError(
                f"{self.tuner_layer_cls.method} runs the same adapter for a whole batch and cannot mix adapter_names in "
                "it; call set_adapter(name)"
            )
        yield

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        key = key.replace(f"{cls._container()}.{adapter_name}.", f"{cls._container()}.", 1)
        # PEFT names a fully trained module's tensor twice when it also saves the embedding layers.
        return key.replace(f".modules_to_save.{adapter_name}.", ".", 1)

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        saved = {cls._remove_adapter_name_from_key(key, adapter_name): value for key, value in tensors.items()}
        saved.update(_trained_modules(model, adapter_name, state_dict))
        # A plan asks for names and sizes alone, a checkpoint of shards for this process's part.
        if all(has_values(tensor) and not is_sharded(tensor) for tensor in saved.values()):
            manifest.remember(config, saved, base_signature(with_head(model)))
        return tensors

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        # The manifest is of the file that the adapter was made from. Trainer loads later checkpoints into it as well.
        layers = [m for m in model.modules() if isinstance(m, cls.tuner_layer_cls) and adapter_name in m.unchecked]
        if layers:
            manifest.check(config.manifest, state_dict, container=cls._container())
        for layer in layers:
            del layer.unchecked[adapter_name]
        # PEFT has entered a trained module's tensors under this adapter's name; files of version 0.1 may hold them a
        # second time, under the name of the adapter that was saved, which may be another one of this model.
        own = f".modules_to_save.{adapter_name}."
        state_dict = {k: tensor for k, tensor in state_dict.items() if own in k or ".modules_to_save." not in k}
        tensors = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        cls._check_configuration(model, config, adapter_name, state_dict, tensors)
        return tensors

    @classmethod
    def _check_configuration(cls, model, config, adapter_name: str, state_dict: dict, tensors: dict) -> None:
        """Check that the tensors of a file are those of the modules that the configuration made.

        Args:
            state_dict: the tensors by their names in the file.
            tensors: the same by the names of the model's parameters.

        Raises:
            CheckpointError: naming the first tensor of another shape.
        """
        if config.manifest is None:
            return
        inside = f".{cls._container()}.{adapter_name}."
        for name, parameter in model.named_parameters():
            found = None if name not in tensors else list(tensors[name].shape)
            if inside in name and found != list(parameter.shape):
                raise manifest.CheckpointError(
                    f"{manifest.WEIGHTS_NAME}: tensor {name.replace(inside, inside[: -len(adapter_name) - 1])!r} has shape "
                    f"{found}, the configuration asks for {list(parameter.shape)}"
                )


def with_head(model: nn.Module) -> nn.Module:
    """The transformers model itself, whether or not PEFT wraps it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _trained_modules(model: nn.Module, adapter_name: str, state_dict: dict) -> dict[str, torch.Tensor]:
    """Tensors of `modules_to_save`, as PEFT is about to add them to the method's own."""
    tensors = {}
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            own = {k.removeprefix(f"{path}."): v for k, v in state_dict.items() if k.startswith(f"{path}.")}
            saved = module.adapter_state_dict(adapter_name, own)
            tensors.update({f"{path}.{key}": value for key, value in saved.items()})
    return tensors


def base_signature(model: nn.Module) -> dict[str, object]:
    """What an adapter depends on in its base: the type and the sizes, as far as the model says them."""
    try:
        stack = find_decoder_stack(model)
    except UnsupportedArchitectureError:
        config = getattr(model, "config", None)
        sizes = {name: getattr(config, name, None) for name in ("hidden_size", "num_hidden_layers")}
        known = {name: size for name, size in sizes.items() if isinstance(size, int)}
        return {"model_type": getattr(config, "model_type", None) or type(model).__name__, **known}
    return {
        "model_type": stack.model_type,
        "hidden_size": stack.spec.hidden_size,
        "num_hidden_layers": len(stack.blocks),
        "output_size": stack.output_size,
    }
