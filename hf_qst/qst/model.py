"""The PEFT tuner of QST."""

from __future__ import annotations

from hf_qst.base_model.architecture import one_stream
from hf_qst.base_model.decoder_stack import DecoderStack, find_decoder_stack
from hf_qst.base_model.packed_weights import find_packed, keep_packed_weights
from hf_qst.qst.continuous_batching import RefuseContinuousBatching
from hf_qst.qst.frozen_head import FrozenHeadLoss
from hf_qst.qst.layer import QSTLayer
from hf_qst.qst.principal_directions import fit_principal
from hf_qst.qst.side_block import reduction
from hf_qst.qst.side_network import SideNetwork
from hf_qst.tuner.stack_tuner import StackTuner


class QSTModel(StackTuner):
    """Adds a side network to a frozen base; made by `get_peft_model(model, QSTConfig(...))`.

    Args:
        model ([`~transformers.PreTrainedModel`]): the base, in any floating dtype or quantised.
        config ([`QSTConfig`]): its settings.
        adapter_name (`str`): the adapter's name.
    """

    prefix = "qst_"
    tuner_layer_cls = QSTLayer

    def _prepare_adapter_config(self, peft_config, model_config):
        peft_config = super()._prepare_adapter_config(peft_config, model_config)
        if peft_config.r is None:
            peft_config.r = reduction(find_decoder_stack(self.model).spec, peft_config.side_heads)
        return peft_config

    def _check_stack(self, peft_config, stack: DecoderStack) -> None:
        if peft_config.tail_layers >= len(stack.blocks):
            raise ValueError(
                f"QSTConfig.tail_layers must be less than the number of blocks of the base, {len(stack.blocks)}, got "
                f"{peft_config.tail_layers}: the side network reads those below. For LoRA in all blocks use PEFT's LoraConfig."
            )
        if peft_config.tail_layers and stack.architecture.state is not one_stream:
            raise ValueError(
                f"QSTConfig.tail_layers must be 0 for {stack.model_type}, got {peft_config.tail_layers}: its blocks have several "
                "residual streams, and the side network's output is mixed into one"
            )
        below = len(stack.blocks) - peft_config.tail_layers
        if (source := max(stack.attention_sources()[:below])) >= below:
            raise ValueError(
                f"QSTConfig.tail_layers must leave block {source} below the tail, whose attention the side network follows, got "
                f"{peft_config.tail_layers} of {len(stack.blocks)} blocks"
            )
        tail = stack.blocks[below:]
        if not peft_config.inference_mode and (packed := find_packed(tail)) is not None:
            raise ValueError(
                f"QSTConfig.tail_layers={peft_config.tail_layers}: bitsandbytes has packed the 4-bit weights of the tail "
                f"({packed!r}) for a kernel without backward, as it does at a model's first forward in evaluation mode on "
                "this processor: load the base again and wrap it before it runs"
            )
        inside = [name for name, _ in stack.module.named_modules()]
        for wanted in peft_config.modules_to_save or ():
            if any(name == wanted or name.endswith(f".{wanted}") for name in inside):
                raise ValueError(
                    f"QSTConfig.modules_to_save names {wanted!r}, which lies inside the frozen base: nothing is "
                    "back-propagated there. Only modules after the decoder stack, such as the head, can be trained."
                )

    def _make_network(self, peft_config, stack: DecoderStack) -> SideNetwork:
        return SideNetwork(peft_config, stack)

    def _make_layer(self, target, stack: DecoderStack) -> QSTLayer:
        layer = super()._make_layer(target, stack)
        layer.hook_handles += FrozenHeadLoss(layer.active_network).install(self.model)
        layer.hook_handles += keep_packed_weights(target)
        layer.hook_handles.append(RefuseContinuousBatching(self.model, layer))
        return layer

    def _start(self, peft_config, adapter_name: str, twin: SideNetwork | None) -> None:
        layer = self.stack_layer
        network = layer.networks[adapter_name]
        if peft_config.downsample != "principal" or any(p.is_meta for p in network.parameters()):
            return
        if twin is not None:
            for part, fitted in zip(network.downsample, twin.downsample, strict=True):
                part.directions.data.copy_(fitted.directions)
                part.mean.data.copy_(fitted.mean)
        elif peft_config.manifest is None:  # otherwise they are about to be loaded
            blocks = find_decoder_stack(self.model).blocks
            read = [blocks[i] for i in network.places]
            data, reads_embedding = peft_config.calibration_data, network.places[0] == 0
            fit_principal(self.model, layer.base_layer, read, reads_embedding, network.downsample, data)
