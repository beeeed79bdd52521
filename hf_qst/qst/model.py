"""The PEFT tuner of QST."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager, nullcontext

from hf_qst.base_model.architecture import one_stream
from hf_qst.base_model.decoder_stack import DecoderStack, find_decoder_stack
from hf_qst.base_model.packed_weights import find_packed, forbid_packing_where_it_fails, keep_packed_weights
from hf_qst.qst.continuous_batching import RefuseContinuousBatching
from hf_qst.qst.frozen_head import FrozenHeadLoss
from hf_qst.qst.hidden_states.cache import HiddenStateCache
from hf_qst.qst.layer import QSTLayer
from hf_qst.qst.mixed_batches import adapters_by_row
from hf_qst.qst.principal_directions import fit_principal
from hf_qst.qst.side_block import reduction
from hf_qst.qst.side_network import SideNetwork
from hf_qst.qst.weight_average import add_average
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
        network = SideNetwork(peft_config, stack)
        if peft_config.hidden_state_cache is not None:
            network.hidden_states = HiddenStateCache(peft_config.hidden_state_cache, stack, peft_config.tail_layers)
        return network

    def _make_layer(self, target, stack: DecoderStack) -> QSTLayer:
        layer = super()._make_layer(target, stack)
        loss = FrozenHeadLoss(layer.network_of_loss)
        layer.hook_handles += layer.in_turn.install(self.model, lambda: loss.install(self.model))
        forbid_packing_where_it_fails(target)
        layer.hook_handles += keep_packed_weights(target)
        layer.hook_handles.append(RefuseContinuousBatching(self.model, layer))
        return layer

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        names = kwargs.get("adapter_names")
        with nullcontext() if names is None else adapters_by_row(self.model, self.stack_layer, names, kwargs):
            yield

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add an adapter whose weights are a weighted average of those of others, at the cost of running one.

        It is of use for side networks that started from the same weights, such as those of one training with several
        learning rates; the average of others is noise. `set_adapter([...])` averages outputs, whatever the networks.

        Args:
            adapters (`list[str]`): names of the others, which have equal configurations where shapes depend on them.
            weights (`list[float]`): one for each; their sum is 1.
            adapter_name (`str`): of the new one; one that exists stays as it is.
            combination_type (`str`): `"linear"`, of PEFT's types.

        Raises:
            ValueError: an unknown adapter or type, weights that do not fit, or networks that cannot be averaged.
        """
        if adapter_name not in self.peft_config:
            add_average(self, adapters, weights, adapter_name, combination_type)

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
            stack = find_decoder_stack(self.model)
            read = [stack.blocks[i] for i in network.places]
            data, reads_embedding = peft_config.calibration_data, network.places[0] == 0
            fit_principal(self.model, layer.base_layer, read, stack.state, reads_embedding, network.downsample, data)
