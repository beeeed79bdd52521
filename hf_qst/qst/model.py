"""The PEFT tuner of QST."""

from __future__ import annotations

import logging
from contextlib import contextmanager

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from hf_qst import manifest
from hf_qst.decoder_stack import DecoderStack, find_decoder_stack
from hf_qst.frozen_head import FrozenHeadLoss
from hf_qst.packed_weights import keep_packed_weights
from hf_qst.qst.calibrate import fit_principal
from hf_qst.qst.layer import QSTLayer, SideNetworkMergeError
from hf_qst.qst.side_network import SideNetwork

logger = logging.getLogger(__name__)


class QSTModel(BaseTuner):
    """Puts a side network beside a frozen base, as `get_peft_model(model, QSTConfig(...))` does.

    Args:
        model ([`~transformers.PreTrainedModel`]): the base, in any floating dtype or quantised.
        config ([`QSTConfig`])
        adapter_name (`str`)
    """

    prefix = "qst_"
    tuner_layer_cls = QSTLayer
    target_module_mapping = {}

    def _prepare_adapter_config(self, peft_config, model_config):
        stack = find_decoder_stack(self.model)
        self._check_modules_to_save(peft_config, stack)
        if peft_config.manifest is not None:
            manifest.check_base(peft_config.manifest, base_signature(stack))
        peft_config.target_modules = {stack.path}
        return peft_config

    def _check_modules_to_save(self, peft_config, stack: DecoderStack) -> None:
        inside = [name for name, _ in stack.module.named_modules()]
        for wanted in peft_config.modules_to_save or ():
            if any(name == wanted or name.endswith(f".{wanted}") for name in inside):
                raise ValueError(
                    f"QSTConfig.modules_to_save names {wanted!r}, which lies inside the frozen base: nothing is "
                    "back-propagated there. Only modules after the decoder stack, such as the head, can be trained."
                )

    @staticmethod
    def _check_target_module_exists(peft_config, key: str) -> bool:
        return key in peft_config.target_modules

    def _check_new_adapter_config(self, config) -> None:
        super()._check_new_adapter_config(config)
        for module in self.model.modules():
            if isinstance(module, BaseTunerLayer) and not isinstance(module, QSTLayer):
                raise ValueError(
                    f"QST runs its base without gradients, so the {type(module).__name__} adapters in it could not be "
                    "trained. Merge or unload them first."
                )

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        stack = find_decoder_stack(self.model)
        network = SideNetwork(peft_config, stack)
        if isinstance(target, QSTLayer):
            layer = target
        else:
            layer = QSTLayer(target, stack)
            loss = FrozenHeadLoss(_WantsChunks(layer))
            layer.hook_handles += loss.install(self.model)
            layer.hook_handles += keep_packed_weights(target)
            self._replace_module(parent, target_name, layer, target)
        layer.update_layer(adapter_name, network, peft_config.inference_mode)
        layer.train(self.model.training)
        layer.unchecked[adapter_name] = peft_config.manifest
        if peft_config.downsample == "principal" and peft_config.manifest is None:
            fit_principal(self.model, layer, network, peft_config.calibration_data)

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        if kwargs.get("adapter_names") is not None:
            raise NotImplementedError(
                "QST runs one side network for a whole batch and cannot mix adapter_names in it; call set_adapter(name)"
            )
        yield

    def _check_merge_allowed(self):
        raise SideNetworkMergeError()

    def _unload_and_optionally_merge(self, merge=True, **kwargs):
        if merge:
            self._check_merge_allowed()
        for module in self.model.modules():
            if isinstance(module, QSTLayer):
                module.remove_hooks()
        return super()._unload_and_optionally_merge(merge=False, **kwargs)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f"qst_net.{adapter_name}.", "qst_net.", 1)

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        names = {key: cls._remove_adapter_name_from_key(key, adapter_name) for key in tensors}
        base = base_signature(find_decoder_stack(_with_head(model)))
        saved = {names[key]: value for key, value in tensors.items()}
        manifest.remember(config, {**saved, **_trained_modules(model, adapter_name, state_dict)}, base)
        return tensors

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        if config.manifest is not None:
            manifest.check(config.manifest, _as_saved(state_dict, config, adapter_name))
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


class _WantsChunks:
    """Asks a `QSTLayer` whether its active adapter computes the loss in chunks."""

    def __init__(self, layer: QSTLayer):
        self.layer = layer

    def __call__(self) -> bool:
        network = self.layer.active_network()
        return network is not None and network.chunked_loss


def _with_head(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _trained_modules(model: nn.Module, adapter_name: str, state_dict: dict) -> dict[str, torch.Tensor]:
    """Tensors of `modules_to_save`, as PEFT is about to add them to the side network's."""
    tensors = {}
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            own = {k.removeprefix(f"{path}."): v for k, v in state_dict.items() if k.startswith(f"{path}.")}
            saved = module.adapter_state_dict(adapter_name, own)
            tensors.update({f"{path}.{key}": value for key, value in saved.items()})
    return tensors


def _as_saved(state_dict: dict[str, torch.Tensor], config: PeftConfig, adapter_name: str) -> dict[str, torch.Tensor]:
    """Keys as they stand in the file: PEFT has already renamed those of fully trained modules."""
    return {key.replace(f".modules_to_save.{adapter_name}.", ".", 1): value for key, value in state_dict.items()}


def base_signature(stack: DecoderStack) -> dict:
    """What a side network depends on in its base."""
    return {
        "model_type": stack.model_type,
        "hidden_size": stack.spec.hidden_size,
        "num_hidden_layers": len(stack.blocks),
        "output_size": stack.output_size,
    }
