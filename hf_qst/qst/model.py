"""The PEFT tuner of QST."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer

from hf_qst.decoder_stack import DecoderStack, find_decoder_stack
from hf_qst.frozen_head import FrozenHeadLoss
from hf_qst.packed_weights import keep_packed_weights
from hf_qst.qst.calibrate import fit_principal
from hf_qst.qst.layer import QSTLayer, SideNetworkMergeError
from hf_qst.qst.side_network import SideNetwork
from hf_qst.stack_tuner import StackTuner


class QSTModel(StackTuner):
    """Puts a side network beside a frozen base, as `get_peft_model(model, QSTConfig(...))` does.

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

    def _check_merge_allowed(self):
        raise SideNetworkMergeError()


class _WantsChunks:
    """Asks a `QSTLayer` whether its active adapter computes the loss in chunks."""

    def __init__(self, layer: QSTLayer):
        self.layer = layer

    def __call__(self) -> bool:
        network = self.layer.active_network()
        return network is not None and network.chunked_loss
