"""Stage 1: what each layer loses at each rank, and the best factors of one weight for the inputs that it sees."""

from hf_qst.mixed_rank.decomposition.factors import factorize, output_energies, output_error
from hf_qst.mixed_rank.decomposition.metrics import METRICS, metric_matrix, shrinkage_intensity
from hf_qst.mixed_rank.decomposition.spectrum import DENSE, LayerSpectrum

__all__ = [
    "DENSE",
    "METRICS",
    "LayerSpectrum",
    "factorize",
    "metric_matrix",
    "output_energies",
    "output_error",
    "shrinkage_intensity",
]
