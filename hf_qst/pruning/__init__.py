"""What pruning methods share: sizes of a decoder, widths under a budget, the pruned branch and its kernels.

Importing this package registers pruned branches as a kind of changed module.
"""

from hf_qst.pruning.branch import KIND, PrunedBranch, prune_blocks
from hf_qst.pruning.fused import use_kernels, use_kernels_where_measured
from hf_qst.reshaped_models import register_kind

__all__ = ["PrunedBranch", "prune_blocks", "use_kernels"]

register_kind(KIND, PrunedBranch.from_description, finish=use_kernels_where_measured)
