"""Tune, shrink and decode large models on the hardware you have.

Importing this package registers its methods with PEFT. Here are the names that a script needs; the rest is in the
subpackage that says what it is for: `hf_qst.errors`, `hf_qst.pruning`, `hf_qst.reshaped_models`, a folder a method.
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING

# The versions of other packages, before their names are imported that older ones do not have.
from hf_qst import requirements  # noqa: F401
from hf_qst.disp import DISPConfig
from hf_qst.mixed_rank import MixedRankConfig, compress_model, rank_report
from hf_qst.pruning import prune_model
from hf_qst.qst import QSTConfig
from hf_qst.reshaped_models import quantize_experts, to_dense
from hf_qst.supported import register_architecture, supported_models
from hf_qst.version import __version__

if TYPE_CHECKING:
    from hf_qst.planning import plan
    from hf_qst_plugins.adaptive_temperature import AdaptiveTemperatureLogitsProcessor, adaptive_generate_kwargs
    from hf_qst_plugins.pruning import DISPCallback
    from hf_qst_plugins.side_networks import train_together

# The plugins import this package, so their names are looked up when they are first asked for; a plan is not always made.
_LATER = {
    "AdaptiveTemperatureLogitsProcessor": "hf_qst_plugins.adaptive_temperature",
    "DISPCallback": "hf_qst_plugins.pruning",
    "adaptive_generate_kwargs": "hf_qst_plugins.adaptive_temperature",
    "plan": "hf_qst.planning",
    "train_together": "hf_qst_plugins.side_networks",
}
# Names that were here, and where they are now.
_MOVED = {
    "hf_qst.disp": ("DISPModel", "PruningReport"),
    "hf_qst.errors": (
        "BudgetError",
        "CalibrationError",
        "CheckpointError",
        "NoDenseWeightsError",
        "ReshapedModelError",
        "SideNetworkMergeError",
        "UnsupportedArchitectureError",
    ),
    "hf_qst.mixed_rank": ("LowRankLinear", "MixedRankModel"),
    "hf_qst.pruning": ("PrunedBranch", "prune_blocks", "register_pruning_method"),
    "hf_qst.qst": ("QSTModel",),
    "hf_qst.reshaped_models": ("register_kind", "reshape_model"),
    "hf_qst_plugins.adaptive_temperature": (
        "LastTokenTemperatureLogitsProcessor",
        "VLLMAdaptiveTemperature",
        "install_adaptive_temperature",
        "uninstall_adaptive_temperature",
    ),
}

__all__ = [
    "AdaptiveTemperatureLogitsProcessor",
    "DISPCallback",
    "DISPConfig",
    "MixedRankConfig",
    "QSTConfig",
    "__version__",
    "adaptive_generate_kwargs",
    "compress_model",
    "plan",
    "prune_model",
    "quantize_experts",
    "rank_report",
    "register_architecture",
    "supported_models",
    "to_dense",
    "train_together",
]


def __getattr__(name: str) -> object:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    for home, names in _MOVED.items():
        if name in names:
            warnings.warn(f"hf_qst.{name} has moved: import it from {home}", FutureWarning, stacklevel=2)
            return getattr(import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
