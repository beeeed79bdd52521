"""Mixed-rank compression: activation-aware low-rank factors with a rank for each layer, as a PEFT method."""

from hf_qst.mixed_rank.allocation import BudgetError, LayerSpectrum, allocate_ranks
from hf_qst.mixed_rank.calibration_set import ROWS_PER_DIMENSION, CalibrationSet
from hf_qst.mixed_rank.compensation import least_squares_factors
from hf_qst.mixed_rank.compensation.two_streams import replace_in_order
from hf_qst.mixed_rank.compression import compress, compress_model
from hf_qst.mixed_rank.config import CompressionResults, MixedRankConfig
from hf_qst.mixed_rank.decomposition import factorize, metric_matrix, output_energies, output_error
from hf_qst.mixed_rank.decomposition.stage import Decomposition
from hf_qst.mixed_rank.from_disk import FolderCompression, compress_folder
from hf_qst.mixed_rank.layer import KIND, LowRankLinear, MixedRankLayer, NoDenseWeightsError
from hf_qst.mixed_rank.model import MixedRankModel
from hf_qst.mixed_rank.pipeline import Compression, Pipeline
from hf_qst.mixed_rank.predictions import installed
from hf_qst.mixed_rank.rank_report import rank_report
from hf_qst.mixed_rank.sensitivity import SENSITIVITY_TOKENS, fisher_weights
from hf_qst.mixed_rank.stage_configs import AllocationConfig, CompensationConfig, DecompositionConfig, ResidualConfig
from hf_qst.mixed_rank.target_weights import TargetWeights
from hf_qst.mixed_rank.targets import find_targets
from hf_qst.mixed_rank.workload import InputGroup, double_products, workload
from hf_qst.reshaped_models import register_kind
from hf_qst.tuner.registration import register_method

register_method(MixedRankConfig, MixedRankModel)
register_kind(KIND, LowRankLinear.from_description)

__all__ = [
    "ROWS_PER_DIMENSION",
    "SENSITIVITY_TOKENS",
    "AllocationConfig",
    "BudgetError",
    "CalibrationSet",
    "CompensationConfig",
    "Compression",
    "CompressionResults",
    "Decomposition",
    "DecompositionConfig",
    "FolderCompression",
    "InputGroup",
    "LayerSpectrum",
    "LowRankLinear",
    "MixedRankConfig",
    "MixedRankLayer",
    "MixedRankModel",
    "NoDenseWeightsError",
    "Pipeline",
    "ResidualConfig",
    "TargetWeights",
    "allocate_ranks",
    "compress",
    "compress_folder",
    "compress_model",
    "double_products",
    "factorize",
    "find_targets",
    "fisher_weights",
    "installed",
    "least_squares_factors",
    "metric_matrix",
    "output_energies",
    "output_error",
    "rank_report",
    "replace_in_order",
    "workload",
]
