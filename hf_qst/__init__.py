"""Tune, shrink and decode large models on the hardware you have.

Importing this package registers its methods with PEFT.
"""

from hf_qst.decoder_stack import UnsupportedArchitectureError
from hf_qst.manifest import CheckpointError
from hf_qst.qst import QSTConfig, QSTModel, SideNetworkMergeError
from hf_qst.version import __version__

__all__ = [
    "CheckpointError",
    "QSTConfig",
    "QSTModel",
    "SideNetworkMergeError",
    "UnsupportedArchitectureError",
    "__version__",
]
