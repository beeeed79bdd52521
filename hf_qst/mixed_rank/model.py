"""The PEFT tuner of mixed-rank compression."""

from __future__ import annotations

import copy
import re

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from hf_qst import manifest
from hf_qst.linear_layers import dense_shape, is_linear
from hf_qst.manifest import WEIGHTS_NAME, CheckpointError
from hf_qst.mixed_rank.compression import compress, finished
from hf_qst.mixed_rank.layer import KIND, LowRankLinear, MixedRankLayer, NoDenseWeightsError
from hf_qst.mixed_rank.quantization import (
    dequantize_factors,
    quantize_factors,
    require_available,
    saved_rank,
    scheme_of,
)
from hf_qst.mixed_rank.targets import matches
from hf_qst.offloading import require_in_place
from hf_qst.reshaped_models import ReshapedModel, to_dense


class MixedRankModel(BaseTuner):
    """Replaces a model's linear layers by factors, as `get_peft_model(model, MixedRankConfig(...))` does.

    Without a saved manifest the configuration is compressed from its calibration data; with one, empty factors of the
    saved ranks are made, which the loaded weights fill.

    Args:
        model ([`~transformers.PreTrainedModel`]): the dense model.
        config ([`MixedRankConfig`]): is not changed; the model's own copy (`peft_config[name]`) holds the chosen ranks.
        adapter_name (`str`)
    """

    prefix = "mixed_rank_"
    tuner_layer_cls = MixedRankLayer
    target_module_mapping = {}

    def __init__(self, model: nn.Module, config, adapter_name: str, *args, **kwargs):
        # transformers' own adapter methods give one configuration, PEFT's models a dictionary.
        if isinstance(config, PeftConfig) and config.manifest is not None and config.quantize_factors is not None:
            raise NotImplementedError(
                f"transformers' load_adapter does not read factors in {config.quantize_factors}; use "
                "PeftModel.from_pretrained(model, folder)"
            )
        super().__init__(model, config, adapter_name, *args, **kwargs)

    def _check_new_adapter_config(self, config) -> None:
        super()._check_new_adapter_config(config)
        if any(isinstance(module, MixedRankLayer) for module in self.model.modules()):
            raise ValueError(
                "a model can be compressed by mixed rank once: its dense weights are gone. Merge it first "
                "(merge_and_unload), or load the base model again."
            )
        if any(isinstance(module, BaseTunerLayer) for module in self.model.modules()):
            raise ValueError(
                "MixedRankConfig replaces dense weights, but the model has adapters of another method on them; merge "
                "or unload these first"
            )

    def _prepare_adapter_config(self, peft_config, model_config):
        name = next(name for name, config in self.peft_config.items() if config is peft_config)
        config = self.peft_config[name] = copy.copy(peft_config)
        if config.manifest is None or config.calibration_data is not None:
            found = compress(self.model, config)
            if not found.factors:
                raise ValueError(
                    f"MixedRankConfig.keep_ratio={config.keep_ratio} leaves all {len(found.dense)} targets dense: "
                    "there is nothing to compress"
                )
            self._factors = found.factors
            config.rank_pattern, config.dense_modules = found.ranks, found.dense
            config.statistics, config.allocation = found.statistics, found.allocation
        else:
            require_in_place(self.model, "MixedRankConfig")
            require_available(config.quantize_factors, self.model, config.mode)
            self._factors = {n: self._empty(n, rank, config) for n, rank in config.rank_pattern.items()}
        config.calibration_data = config.reference_model = None
        if config.target_modules == "all-linear":
            # PEFT would replace it by its own list.
            config.target_modules = None
        return config

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
        layer = MixedRankLayer(adapter_name, factors, target if peft_config.mode == "residual" else None)
        layer.set_adapter([adapter_name], inference_mode=peft_config.inference_mode)
        layer.train(target.training)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        # PEFT's would give the dense weight to the new module.
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """The factors are the model's weights and keep its dtype."""

    def delete_adapter(self, adapter_name: str) -> None:
        if self.peft_config[adapter_name].mode == "replace":
            raise NoDenseWeightsError("deleted")
        super().delete_adapter(adapter_name)

    def _check_merge_allowed(self) -> None:
        for name, module in self.model.named_modules():
            if isinstance(module, MixedRankLayer) and module.is_residual and not module.weight.is_floating_point():
                raise NotImplementedError(
                    f"the residual of {name!r} cannot be merged into a quantised weight: rounding would undo it. Keep "
                    "it as an adapter (save_pretrained), or take the base back with unload()."
                )

    def to_dense(self) -> nn.Module:
        """The base model with dense weights of the original shapes and the compressed model's outputs.

        Raises:
            NotImplementedError: other layers of the base are quantised.
        """
        factors = tuple(f"{name}." for name, m in self.model.named_modules() if isinstance(m, MixedRankLayer))
        for name, module in self.model.named_modules():
            if scheme_of(module) is not None and not name.startswith(factors):
                raise NotImplementedError(
                    f"{name!r} is in {scheme_of(module)}: to_dense() needs a base in floating point. "
                    "merge_and_unload() gives the smaller model"
                )
        for module in self.model.modules():
            if isinstance(module, MixedRankLayer) and not module.is_residual:
                dequantize_factors(module.factors)
        small = self.merge_and_unload()
        return to_dense(small) if isinstance(small, ReshapedModel) else small

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs) -> nn.Module:
        return finished(super()._unload_and_optionally_merge(merge=merge, **kwargs))

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f"mixed_rank_factors.{adapter_name}.", "mixed_rank_factors.", 1)

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        saved = {cls._remove_adapter_name_from_key(key, adapter_name): value for key, value in tensors.items()}
        manifest.remember(config, saved, {})
        return tensors

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        _check_ranks(config.rank_pattern, state_dict)
        if config.manifest is not None:
            manifest.check(config.manifest, manifest.as_saved(state_dict, adapter_name))
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


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
