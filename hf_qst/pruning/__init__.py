"""What pruning methods share: a decoder's sizes, widths under a budget, the pruned branch, its kernels, and pruning by scores.

Importing this package registers pruned branches as a kind of changed module.
"""

from hf_qst.pruning.branch import KIND, PrunedBranch, prune_blocks
from hf_qst.pruning.by_scores import comparable_scores, prune_model
from hf_qst.pruning.fused import use_kernels, use_kernels_where_measured
from hf_qst.pruning.gradients import fisher_scores, taylor_scores
from hf_qst.pruning.layout import SELECTIONS, PruningLayout
from hf_qst.pruning.options import PruningOptions
from hf_qst.pruning.scores import PRUNING_METHODS, PruningMethod, PruningTask, Scores, register_pruning_method
from hf_qst.pruning.widths import SelectionMap, best_channels, masks_by_layer, rounded_width, widths_on_budget
from hf_qst.reshaped_models import register_kind

__all__ = [
    "PRUNING_METHODS",
    "SELECTIONS",
    "PrunedBranch",
    "PruningLayout",
    "PruningMethod",
    "PruningOptions",
    "PruningTask",
    "Scores",
    "SelectionMap",
    "best_channels",
    "comparable_scores",
    "masks_by_layer",
    "prune_blocks",
    "prune_model",
    "register_pruning_method",
    "rounded_width",
    "use_kernels",
    "widths_on_budget",
]

register_kind(KIND, PrunedBranch.from_description, finish=use_kernels_where_measured)
register_pruning_method("taylor", taylor_scores, needs_data=True)
register_pruning_method("fisher", fisher_scores, needs_data=True, allocation="per_weight")
