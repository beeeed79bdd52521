"""Calibration: statistics of the inputs of a model's modules, from a few batches.

- `data`: calibration data in all accepted forms, as a list of batches;
- `sequences`: the token sequences of a batch, and which rows of a module's input are padding;
- `passes`: runs of the model and collection of statistics;
- `moments`: the statistics.
"""

from hf_qst.calibration.data import CalibrationError, as_batches
from hf_qst.calibration.moments import CHUNK_COLUMNS, CrossMoment, SecondMoment
from hf_qst.calibration.passes import (
    CalibrationRun,
    calibration_mode,
    collect_statistics,
    first_input,
    hooks,
    input_groups,
    plan_passes,
)

__all__ = [
    "CHUNK_COLUMNS",
    "CalibrationError",
    "CalibrationRun",
    "CrossMoment",
    "SecondMoment",
    "as_batches",
    "calibration_mode",
    "collect_statistics",
    "first_input",
    "hooks",
    "input_groups",
    "plan_passes",
]
