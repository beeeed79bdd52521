"""What is used around training, whatever the method."""

from hf_qst_plugins.training.non_finite import NonFiniteCallback

__all__ = ["NonFiniteCallback"]
