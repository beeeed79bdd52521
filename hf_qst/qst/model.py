"""The PEFT tuner of QST."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer

from hf_qst.base_model.decoder_stack import DecoderStack, find_decoder_stack
from hf_qst.base_model.packed_weights import keep_packed_weights
from hf_qst.qst.continuous_batching import RefuseContinuousBatching
from hf_qst.qst.frozen_head import FrozenHeadLoss
from hf_qst.qst.layer import QSTLayer, SideNetworkMergeError
from hf_qst.qst.principal_directions import fit_principal
from hf_qst.qst.side_network import SideNetwork
from hf_qst.tuner.stack_tuner import StackTuner


class QSTModel(StackTuner):
    """Adds a side network to a frozen base; made by `get_peft_model(model, QSTConfig(...))`.

    Args:
        model ([`~transformers.PreTrainedModel`]): the base, in any floating dtype or quantised.
        config ([`QSTConfig`])
        adapter_name (`str`)
    """

    prefix = "qst_"
    tuner_layer_cls = QSTLayer

    def _check_stack(self, peft_config, stack: DecoderStack) -> None:
        inside = [name for name, _ in stack.module.named_modules()]
        for wanted in peft_config.modules_to_save or ():
            if any(name == wanted or name.endswith(f".{wanted}") for name in inside):
                raise ValueError(
                    f"QSTConfig.modules_to_save names {wanted!r}, which lies inside the frozen base: nothing is "
                    "back-propagated there. Only modules after the decoder stack, such as the head, can be trained."
                )

    def _check_new_adapter_config(self, config) -> None:
        super()._check_new_adapter_config(config)
        for module in self.model.modules():
            if isinstance(module, BaseTunerLayer) and not isinstance(module, QSTLayer):
                raise ValueError(
                    f"{QSTLayer.alone} The model has adapters of type {type(module).__name__}: merge or unload them first."
                )

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        stack = find_decoder_stack(self.model)
        network = SideNetwork(peft_config, stack)
        if isinstance(target, QSTLayer):
            layer = target
        else:
            layer = QSTLayer(target, stack)
            loss = FrozenHeadLoss(layer.active_network)
            layer.hook_handles += loss.install(self.model)
            layer.hook_handles += keep_packed_weights(target)
            layer.hook_handles.append(RefuseContinuousBatching(self.model, layer))
            self._replace_module(parent, target_name, layer, target)
        layer.update_layer(adapter_name, network, peft_config.inference_mode)
        layer.train(self.model.training)
        layer.unchecked[adapter_name] = peft_config.manifest
        if peft_config.downsample == "principal" and not any(p.is_meta for p in network.parameters()):
            self._fit_principal(peft_config, adapter_name, layer, stack)

    def _fit_principal(self, peft_config, adapter_name: str, layer: QSTLayer, stack: DecoderStack) -> None:
        """Fit the fixed projections, or copy those of an adapter made from the same configuration object."""
        downsamplers = layer.qst_net[adapter_name].downsample
        for name, config in self.peft_config.items():
            if config is peft_config and name != adapter_name and name in layer.qst_net:
                for part, fitted in zip(downsamplers, layer.qst_net[name].downsample, strict=True):
                    part.directions.data.copy_(fitted.directions)
                    part.mean.data.copy_(fitted.mean)
                return
        if peft_config.manifest is None:  # otherwise they are about to be loaded
            data = peft_config.calibration_data
            fit_principal(self.model, layer.base_layer, stack.blocks, downsamplers, data)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """As in PEFT: an adapter is float32, or has the base's dtype with `autocast_adapter_dtype=False`."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            layer = next(module for module in self.model.modules() if isinstance(module, QSTLayer))
            dtype = next(p.dtype for p in layer.base_layer.parameters() if p.is_floating_point())
            layer.qst_net[adapter_name].cast(dtype)

    def _check_merge_allowed(self):
        raise SideNetworkMergeError()
