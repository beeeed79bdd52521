"""Calibration: a few batches run through a model, and statistics of what its modules are given.

- `data`: the forms in which batches come;
- `sequences`: the token sequences of a batch, and the one each module's rows belong to;
- `passes`: the runs and what is collected in them;
- `moments`: second moments of what a layer is given.
"""

from hf_qst.calibration.data import CalibrationError, as_batches
from hf_qst.calibration.moments import CrossMoment, SecondMoment
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
