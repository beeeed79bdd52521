"""What pruning methods share: the sizes of a decoder, widths under a budget, the pruned branch, and pruning by scores."""

from hf_qst.pruning.branch import PrunedBranch, prune_blocks
from hf_qst.pruning.by_scores import prune_model
from hf_qst.pruning.layout import SELECTIONS, PruningLayout
from hf_qst.pruning.options import PruningOptions
from hf_qst.pruning.scores import PRUNING_METHODS, PruningMethod, PruningTask, register_pruning_method

__all__ = [
    "PRUNING_METHODS",
    "SELECTIONS",
    "PrunedBranch",
    "PruningLayout",
    "PruningMethod",
    "PruningOptions",
    "PruningTask",
    "prune_blocks",
    "prune_model",
    "register_pruning_method",
]
