"""Stage 2: a rank for each layer under one budget of parameters."""

from hf_qst.base_model.budget import BudgetError
from hf_qst.mixed_rank.allocation.allocators import ALLOCATORS, allocate_ranks
from hf_qst.mixed_rank.decomposition.spectrum import DENSE, LayerSpectrum

__all__ = ["ALLOCATORS", "DENSE", "BudgetError", "LayerSpectrum", "allocate_ranks"]
