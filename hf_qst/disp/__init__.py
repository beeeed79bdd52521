"""Dimension-independent structural pruning (Gao et al., NeurIPS 2024): widths of its own for every block."""

from hf_qst.disp.config import DISPConfig
from hf_qst.disp.layer import DISPLayer
from hf_qst.disp.model import DISPModel
from hf_qst.disp.report import PruningReport
from hf_qst.disp.start import start_logits
from hf_qst.tuner.registration import register_method

register_method(DISPConfig, DISPModel)

__all__ = ["DISPConfig", "DISPLayer", "DISPModel", "PruningReport", "start_logits"]
