"""What is used around training, whatever the method."""

from hf_qst_plugins.training.non_finite import NonFiniteCallback
from hf_qst_plugins.training.stop_on_signal import StopOnSignalCallback

__all__ = ["NonFiniteCallback", "StopOnSignalCallback"]
