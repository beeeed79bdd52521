"""The PEFT tuner of DISP."""

from __future__ import annotations

import torch
from torch import nn

from hf_qst.base_model.decoder_stack import DecoderStack
from hf_qst.base_model.offloading import require_in_place, require_weights
from hf_qst.base_model.packed_weights import find_packed, forbid_packing
from hf_qst.calibration import as_batches
from hf_qst.disp.layer import DISPLayer
from hf_qst.disp.report import PruningReport
from hf_qst.disp.selection import SelectionNetwork
from hf_qst.disp.start import start_from_scores
from hf_qst.pruning.branch import find_prunable_stack, prune_blocks
from hf_qst.pruning.layout import PruningLayout
from hf_qst.pruning.options import parameter_budget
from hf_qst.reshaped_models import ReshapedModel, to_dense
from hf_qst.tuner.stack_tuner import StackTuner


class DISPModel(StackTuner):
    """Learns which channels each block reads and writes, as `get_peft_model(model, DISPConfig(...))` does.

    Train it with an ordinary Trainer and a `DISPCallback`; `merge_and_unload()` is the smaller model.

    Args:
        model ([`~transformers.PreTrainedModel`]): the base, in any floating dtype or quantised; it stays frozen.
        config ([`DISPConfig`]): its settings.
        adapter_name (`str`): the adapter's name.
    """

    prefix = "disp_"
    tuner_layer_cls = DISPLayer

    def _check_stack(self, peft_config, stack: DecoderStack) -> None:
        require_in_place(self.model, type(peft_config).__name__)
        find_prunable_stack(self.model)
        if (packed := find_packed(self.model)) is not None:
            raise ValueError(
                f"the gates' gradients go through the base, but bitsandbytes has packed {packed!r} for a kernel without "
                "backward, as it does at a model's first forward in evaluation mode on this processor: load the base "
                "again and wrap it before it runs"
            )
        parameter_budget(self.model, stack, peft_config, f"{type(peft_config).__name__}.")

    def _make_network(self, peft_config, stack: DecoderStack) -> SelectionNetwork:
        budget = parameter_budget(self.model, stack, peft_config, f"{type(peft_config).__name__}.")
        return SelectionNetwork(peft_config, PruningLayout.of(stack), budget)

    def _make_layer(self, target: nn.Module, stack: DecoderStack) -> DISPLayer:
        forbid_packing(self.model)  # the gates' gradients go through the base and its head
        return super()._make_layer(target, stack)

    def _start(self, peft_config, adapter_name: str, twin: SelectionNetwork | None) -> None:
        if twin is not None:
            self.disp_layer.networks[adapter_name].copy_buffers(twin)
        self.disp_layer._move_adapter_to_device_of_base_layer(adapter_name)
        network, data = self.disp_layer.networks[adapter_name], peft_config.calibration_data
        if data is not None and network.awaits_start and not any(p.is_meta for p in network.parameters()):
            # As a list: a generator would be used up when a second adapter is made of the same configuration.
            data = as_batches(data, argument="DISPConfig.calibration_data", model=self.model)
            peft_config.calibration_data = data
            start_from_scores(self.model, network, data)

    @property
    def disp_layer(self) -> DISPLayer:
        return self.stack_layer

    def _network(self) -> SelectionNetwork:
        network = self.disp_layer.active_network()
        if network is None:
            raise ValueError("no DISP adapter is active: call set_adapter(name) or enable_adapters()")
        return network

    def disp_masks(self) -> list[dict[str, torch.Tensor]]:
        """For each block its five hardened selections by name, bool [size] on the CPU; True stays."""
        return self._network().masks()

    def disp_report(self) -> PruningReport:
        """Widths, parameters and ratios of the model as it would be exported now."""
        return PruningReport.of(self.model, self._network())

    def harden(self) -> PruningReport:
        """Make the choice of channels for good, by the budget or threshold of the configuration.

        Further training changes nothing. `merge_and_unload` does this by itself.
        """
        network = self._network()
        report = self.disp_report()
        network.harden()
        return report

    def to_dense(self) -> nn.Module:
        """The pruned model's function in the base's own shapes, with zeros in the place of what was pruned."""
        small = self.merge_and_unload()
        return to_dense(small) if isinstance(small, ReshapedModel) else small

    def _unload_and_optionally_merge(
        self, merge: bool = True, safe_merge: bool = False, adapter_names: list[str] | None = None, **kwargs
    ) -> nn.Module:
        masks = None
        if merge:
            require_weights(self.model, "merge_and_unload()")
            self._check_merge_allowed()
            self.disp_layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            masks = self.disp_layer.masks_to_merge()
            if not masks:
                raise ValueError("no DISP adapter is active: call set_adapter(name)")
        model = super()._unload_and_optionally_merge(merge=False, **kwargs)
        return model if masks is None else prune_blocks(model, masks)
