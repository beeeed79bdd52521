"""The PEFT tuner of mixed-rank compression."""

from __future__ import annotations

import copy
import re
import warnings
from contextlib import contextmanager

import torch
from peft import PeftConfig
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from hf_qst.base_model.experts import join, own_memory, split_named
from hf_qst.base_model.linear_layers import dense_shape, is_linear
from hf_qst.base_model.offloading import require_in_place
from hf_qst.base_model.packed_weights import forbid_packing, refuse_training_while_packed
from hf_qst.base_model.quantized_layers import scheme_of
from hf_qst.mixed_rank.compression import compress, finished
from hf_qst.mixed_rank.layer import KIND, LowRankLinear, MixedRankLayer, NoDenseWeightsError
from hf_qst.mixed_rank.quantization import (
    dequantize_factors,
    quantize_factors,
    require_available,
    saved_rank,
)
from hf_qst.mixed_rank.targets import matches
from hf_qst.reshaped_models import ReshapedModel, to_dense
from hf_qst.saved.manifest import WEIGHTS_NAME, CheckpointError
from hf_qst.tuner.manifest_tuner import ManifestTuner


class MixedRankModel(ManifestTuner):
    """Replaces a model's linear layers by factors, as `get_peft_model(model, MixedRankConfig(...))` does.

    Without a saved manifest the configuration is compressed from its calibration data; with one, empty factors of the
    saved ranks are made, which the loaded weights fill.

    Args:
        model ([`~transformers.PreTrainedModel`]): the dense model.
        config ([`MixedRankConfig`]): is not changed; the model's own copy (`peft_config[name]`) holds the chosen ranks.
        adapter_name (`str`): the adapter's name.
    """

    prefix = "mixed_rank_"
    tuner_layer_cls = MixedRankLayer

    def __init__(self, model: nn.Module, config, adapter_name: str, *args, **kwargs):
        # transformers' own adapter methods give one configuration, PEFT's models a dictionary.
        if isinstance(config, PeftConfig) and config.manifest is not None and config.quantize_factors is not None:
            raise NotImplementedError(
                f"transformers' load_adapter does not read factors in {config.quantize_factors}; use "
                "PeftModel.from_pretrained(model, folder)"
            )
        # Paths of the experts that were split for the adapters.
        self._split: list[str] = []
        super().__init__(model, config, adapter_name, *args, **kwargs)

    def _check_new_adapter_config(self, config) -> None:
        super()._check_new_adapter_config(config)
        layers = self._layers()
        keeps = config.mode == "residual" or config.keep_base_weights
        if layers and not (keeps and all(layer.keeps_base for layer in layers.values())):
            raise ValueError(
                "a model can be compressed by mixed rank once: its dense weights are gone. Give every adapter "
                "MixedRankConfig.keep_base_weights=True, merge the first (merge_and_unload), or load the base model "
                "again."
            )

    def inject_adapter(self, model, adapter_name, autocast_adapter_dtype=True, low_cpu_mem_usage=False, **kwargs):
        """As of PEFT; `low_cpu_mem_usage` leaves the factors on the meta device, for weights that are loaded next."""
        self._empty_factors = low_cpu_mem_usage
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, **kwargs)
        except Exception:
            join(self.model, self._split)
            raise
        if not all(layer.keeps_base for layer in self._layers().values()):
            own_memory(self.model)
        # Gradients of factors go through the 4-bit layers that stay.
        forbid_packing(self.model)
        refuse_training_while_packed(self.model)

    def _prepare_adapter_config(self, peft_config, model_config):
        name = next(name for name, config in self.peft_config.items() if config is peft_config)
        config = copy.copy(peft_config)
        self.peft_config[name] = config
        with self._as_base():
            self._make_factors(config)
        config = self.peft_config[name] = config.without_data()
        if config.target_modules == "all-linear":
            # PEFT would replace it by its own list.
            config.target_modules = None
        return config

    @contextmanager
    def _as_base(self):
        """The model as it is without adapters."""
        layers = self._layers()
        wrappers = [module for module in self.model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
        disabled = [wrapper._disable_adapters for wrapper in wrappers]
        merged = [layer for layer in layers.values() if layer.merged]
        if merged:
            warnings.warn("An adapter cannot be added to a merged model. Unmerging the model first.", stacklevel=2)
        for layer in merged:
            layer.unmerge()
        try:
            for wrapper in wrappers:
                wrapper._disable_adapters = True
            for name, layer in layers.items():
                self.model.set_submodule(name, layer.base_layer)
            yield
        finally:
            for name, layer in layers.items():
                self.model.set_submodule(name, layer)
            for wrapper, before in zip(wrappers, disabled, strict=True):
                wrapper._disable_adapters = before

    def _make_factors(self, config) -> None:
        if config.manifest is None or config.calibration_data is not None:
            found = compress(self.model, config)
            if not found.factors:
                raise ValueError(
                    f"MixedRankConfig.keep_ratio={config.keep_ratio} leaves all {len(found.dense)} targets dense: "
                    "there is nothing to compress"
                )
            self._factors, config.manifest = found.factors, None
            if not config.init_weights:
                self._factors = {n: self._random(layer, config) for n, layer in found.factors.items()}
            config.rank_pattern, config.results = found.ranks, found.results
            self._split += split_named(self.model, config.rank_pattern)
        else:
            self._check_base(config)
            require_in_place(self.model, "MixedRankConfig")
            require_available(config.quantize_factors, self.model, config.mode)
            self._split += split_named(self.model, config.rank_pattern)
            self._factors = {n: self._empty(n, rank, config) for n, rank in config.rank_pattern.items()}

    @staticmethod
    def _random(layer: LowRankLinear, config) -> LowRankLinear:
        layer = layer.randomized()
        return layer if config.quantize_factors is None else quantize_factors(layer, config.quantize_factors)

    def _empty(self, name: str, rank: int, config) -> LowRankLinear:
        try:
            module = self.model.get_submodule(name)
        except AttributeError:
            raise CheckpointError(
                f"rank_pattern names {name!r}, which {type(self.model).__name__} does not have"
            ) from None
        if not is_linear(module) or rank > min(dense_shape(module)):
            found = f"a linear layer of {list(dense_shape(module))}" if is_linear(module) else type(module).__name__
            raise CheckpointError(f"rank_pattern gives {name!r} rank {rank}, but it is {found}")
        bias = module.bias is not None and config.mode == "replace"
        layer = LowRankLinear.from_description(module, {"kind": KIND, "rank": rank, "bias": bias})
        with torch.no_grad():
            for parameter in layer.parameters():
                # Should weights never be loaded, their absence shows.
                parameter.fill_(torch.nan)
        return layer if config.quantize_factors is None else quantize_factors(layer, config.quantize_factors)

    @staticmethod
    def _check_target_module_exists(peft_config, key: str):
        if key in peft_config.rank_pattern:
            return True
        # PEFT wants to know what was excluded, and warns when nothing was; the ranks alone would not say.
        found = matches(peft_config, key, ".*")
        return False if found else found

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        factors = self._factors.pop(current_key)
        if self._empty_factors and peft_config.quantize_factors is None:
            factors = factors.to("meta")
        if isinstance(target, MixedRankLayer):
            layer = target
            layer.add_factors(adapter_name, factors, peft_config.mode)
        else:
            keeps = peft_config.mode == "residual" or peft_config.keep_base_weights
            layer = MixedRankLayer(adapter_name, factors, target if keeps else None, peft_config.mode)
            self._replace_module(parent, target_name, layer, target)
        layer.expect(adapter_name, peft_config, current_key)
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)
        layer.train(target.training)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Factors beside dense weights follow PEFT's rule; in their place they are the model's and keep its dtype."""
        config = self.peft_config[adapter_name]
        if config.mode == "replace" and config.keep_base_weights and config.quantize_factors is None:
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    def delete_adapter(self, adapter_name: str) -> None:
        if any(adapter_name in m.mixed_rank_factors and not m.keeps_base for m in self._layers().values()):
            raise NoDenseWeightsError("deleted")
        super().delete_adapter(adapter_name)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As of PEFT; what cannot be merged is named before anything is."""
        for layer in self._layers().values():
            names = layer.active_adapters if adapter_names is None else adapter_names
            layer.check_merge(names)
            if safe_merge:
                layer.check_finite(names)
        super().merge_adapter(adapter_names, safe_merge)

    def to_dense(self) -> nn.Module:
        """The base model with dense weights of the original shapes and the compressed model's outputs.

        Raises:
            NotImplementedError: other layers of the base are quantised.
        """
        factors = tuple(f"{name}." for name in self._layers())
        for name, module in self.model.named_modules():
            if scheme_of(module) is not None and not name.startswith(factors):
                raise NotImplementedError(
                    f"{name!r} is in {scheme_of(module)}: to_dense() needs a base in floating point. "
                    "merge_and_unload() gives the smaller model"
                )
        for layer in self._layers().values():
            for name in layer.used:
                if layer.mixed_rank_modes[name] == "replace":
                    dequantize_factors(layer.mixed_rank_factors[name])
        small = self.merge_and_unload()
        return to_dense(small) if isinstance(small, ReshapedModel) else small

    def _unload_and_optionally_merge(self, merge: bool = True, safe_merge: bool = False, **kwargs) -> nn.Module:
        for layer in self._layers().values():
            layer.check_unload(merge, safe_merge, kwargs.get("adapter_names"))
        model = super()._unload_and_optionally_merge(merge=merge, safe_merge=safe_merge, **kwargs)
        join(model, self._split)
        return finished(model)

    @classmethod
    def _check_configuration(cls, model, config, adapter_name, state_dict, tensors) -> None:
        _check_ranks(config.rank_pattern, state_dict)
        super()._check_configuration(model, config, adapter_name, state_dict, tensors)


def _check_ranks(ranks: dict[str, int], state_dict: dict[str, torch.Tensor]) -> None:
    """Check that the ranks a configuration gives are those of the tensors beside it.

    Raises:
        CheckpointError: naming the layer and both ranks.
    """
    for key in state_dict:
        found = re.fullmatch(r"(?:base_model\.model\.)?(.*)\.mixed_rank_factors\.down\.weight", key)
        if not found:
            continue
        rank, expected = saved_rank(key, state_dict), ranks.get(found[1], 0)
        if rank != expected:
            raise CheckpointError(
                f"{WEIGHTS_NAME}: the factors of {found[1]!r} have rank {rank}, rank_pattern says {expected}"
            )
