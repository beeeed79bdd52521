"""DISP in an ordinary Trainer: the callback and its plots."""

from hf_qst_plugins.pruning.callback import DISPCallback

__all__ = ["DISPCallback"]
