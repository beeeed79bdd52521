"""Tune, shrink and decode large models on the hardware you have.

Importing this package registers its methods with PEFT.
"""

from importlib import import_module

from hf_qst.base_model.decoder_stack import UnsupportedArchitectureError
from hf_qst.calibration import CalibrationError
from hf_qst.disp import (
    DISPConfig,
    DISPModel,
    PrunedBranch,
    PruningReport,
    prune_blocks,
    prune_model,
    register_pruning_method,
)
from hf_qst.mixed_rank import (
    BudgetError,
    LowRankLinear,
    MixedRankConfig,
    MixedRankModel,
    NoDenseWeightsError,
    compress_model,
    rank_report,
)
from hf_qst.qst import QSTConfig, QSTModel, SideNetworkMergeError
from hf_qst.reshaped_models import ReshapedModelError, register_kind, reshape_model, to_dense
from hf_qst.saved.manifest import CheckpointError
from hf_qst.version import __version__

# The plugins import this package, so their names are looked up when they are first asked for.
_OF_PLUGINS = {
    "AdaptiveTemperatureLogitsProcessor": "hf_qst_plugins.adaptive_temperature",
    "DISPCallback": "hf_qst_plugins.pruning",
    "LastTokenTemperatureLogitsProcessor": "hf_qst_plugins.adaptive_temperature",
    "VLLMAdaptiveTemperature": "hf_qst_plugins.adaptive_temperature",
    "adaptive_generate_kwargs": "hf_qst_plugins.adaptive_temperature",
    "install_adaptive_temperature": "hf_qst_plugins.adaptive_temperature",
    "uninstall_adaptive_temperature": "hf_qst_plugins.adaptive_temperature",
}

__all__ = [
    "AdaptiveTemperatureLogitsProcessor",
    "BudgetError",
    "CalibrationError",
    "CheckpointError",
    "DISPCallback",
    "DISPConfig",
    "DISPModel",
    "LastTokenTemperatureLogitsProcessor",
    "LowRankLinear",
    "MixedRankConfig",
    "MixedRankModel",
    "NoDenseWeightsError",
    "PrunedBranch",
    "PruningReport",
    "QSTConfig",
    "QSTModel",
    "ReshapedModelError",
    "SideNetworkMergeError",
    "UnsupportedArchitectureError",
    "VLLMAdaptiveTemperature",
    "__version__",
    "adaptive_generate_kwargs",
    "compress_model",
    "install_adaptive_temperature",
    "prune_blocks",
    "prune_model",
    "rank_report",
    "register_kind",
    "register_pruning_method",
    "reshape_model",
    "to_dense",
    "uninstall_adaptive_temperature",
]


def __getattr__(name: str):
    if name in _OF_PLUGINS:
        return getattr(import_module(_OF_PLUGINS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
