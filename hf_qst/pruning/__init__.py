"""What pruning methods share: sizes of a decoder, widths under a budget, the pruned branch."""

from hf_qst.pruning.layout import SELECTIONS, PruningLayout
from hf_qst.pruning.widths import best_channels, masks_by_layer, rounded_width, widths_on_budget

__all__ = ["SELECTIONS", "PruningLayout", "best_channels", "masks_by_layer", "rounded_width", "widths_on_budget"]
