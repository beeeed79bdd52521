"""Every error class of the package, in one place for `except`."""

from hf_qst.base_model.budget import BudgetError
from hf_qst.base_model.decoder_stack import UnsupportedArchitectureError
from hf_qst.base_model.offloading import MissingWeightsError
from hf_qst.calibration import CalibrationError
from hf_qst.disp.selection import UndecidableError
from hf_qst.mixed_rank import NoDenseWeightsError
from hf_qst.planning import PlanError
from hf_qst.qst import HiddenStateCacheError, SideNetworkMergeError
from hf_qst.reshaped_models import ReshapedModelError
from hf_qst.saved.manifest import CheckpointError

__all__ = [
    "BudgetError",
    "CalibrationError",
    "CheckpointError",
    "HiddenStateCacheError",
    "MissingWeightsError",
    "NoDenseWeightsError",
    "PlanError",
    "ReshapedModelError",
    "SideNetworkMergeError",
    "UndecidableError",
    "UnsupportedArchitectureError",
]
