"""Names that fields of `MixedRankConfig` had before they were nested, in arguments and in saved files."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Mapping
from dataclasses import is_dataclass

from hf_qst.mixed_rank.stage_configs import StageConfig

# Each earlier name, the field that holds it now, and its name there.
EARLIER = {
    "metric": ("decomposition", "metric"),
    "shrinkage": ("decomposition", "shrinkage"),
    "shrinkage_scale": ("decomposition", "shrinkage_scale"),
    "bias_correction": ("decomposition", "bias_correction"),
    "allocator": ("allocation", "allocator"),
    "layer_weight": ("allocation", "layer_weight"),
    "rank_multiple": ("allocation", "rank_multiple"),
    "min_rank_ratio": ("allocation", "min_rank_ratio"),
    "allow_dense": ("allocation", "allow_dense"),
    "min_saving": ("allocation", "min_saving"),
    "compensation_ridge": ("compensation", "ridge"),
    "residual_ratio": ("compensation", "residual_ratio"),
    "compensation_steps": ("compensation", "steps"),
    "compensation_lr": ("compensation", "lr"),
    "reference_model": ("residual", "reference_model"),
    "residual_rank": ("residual", "rank"),
    "dense_modules": ("results", "dense_modules"),
    "statistics": ("results", "statistics"),
}
# Earlier, "residual" was a mode, and `allocation` what the allocator "auto" chose.
MODES = ("replace", "residual")


def nested(values: Mapping, stages: Mapping[str, type[StageConfig]]) -> dict:
    """The same arguments under the names of today.

    Args:
        values: arguments, or the fields of a saved file.
        stages: the settings of each stage by the field that holds them.
    """
    given = {name: value for name, value in values.items() if name not in EARLIER and name != "mode"}
    if len(given) == len(values):
        return given
    mode, reference = values.get("mode", "replace"), values.get("reference_model")
    if mode not in MODES:
        raise ValueError(f"MixedRankConfig.mode must be one of {', '.join(MODES)}, got {mode!r}")
    if mode != "residual" and reference is not None:
        raise ValueError(f"MixedRankConfig.reference_model is only used by mode='residual', got mode={mode!r}")
    if "allocator" in values and "peft_type" in values:
        given["results"] = {"allocation": given.pop("allocation", None)}
    if mode == "residual":
        given.setdefault("residual", {})
    for name, (field, now) in EARLIER.items():
        if name not in values or (field == "residual" and mode != "residual"):
            continue
        inside = given.get(field, {})
        if isinstance(inside, str):
            inside = {stages[field].choice: inside}
        elif is_dataclass(inside):
            inside = vars(inside)
        given[field] = {**inside, now: values[name]}
    return given


def accept_earlier_names(cls):
    """Class decorator of `MixedRankConfig`: earlier names are taken and read, and what a saved file holds.

    An argument by an earlier name brings a FutureWarning. A saved file, known by its `peft_type`, brings none; it may
    hold results, which are no arguments, and unknown keys, which one warning names.
    """
    make = cls.__init__
    accepted = inspect.signature(make).parameters.keys()

    @functools.wraps(make)
    def __init__(self, *args, **kwargs):
        values, results = nested(kwargs, cls.stages), None
        if "peft_type" in kwargs:
            results = values.pop("results", None)
            values = _without_unknown(values, accepted, cls)
        elif "results" in values:
            raise TypeError("MixedRankConfig: dense_modules and statistics are results and no arguments")
        elif earlier := [name for name in kwargs if name in EARLIER or name == "mode"]:
            spelled = (f"{name} is now {'.'.join(EARLIER.get(name, ('residual',)))}" for name in earlier)
            warnings.warn(f"MixedRankConfig: {', '.join(spelled)}", FutureWarning, stacklevel=2)
        make(self, *args, **values)
        if results is not None:
            self.results = type(self.results)(**results)

    def __getattr__(self, name: str):
        if name not in EARLIER:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        field, now = EARLIER[name]
        return getattr(getattr(self, field), now)

    cls.__init__, cls.__getattr__ = __init__, __getattr__
    return cls


def _without_unknown(values: dict, accepted, cls) -> dict:
    """Fields of a file without those of later versions, in PEFT's words."""
    unknown = [name for name in values if name not in accepted]
    kept = {name: value for name, value in values.items() if name in accepted}
    for field, stage in cls.stages.items():
        if isinstance(kept.get(field), Mapping):
            names = stage.field_names()
            unknown += [f"{field}.{name}" for name in kept[field] if name not in names]
            kept[field] = {name: value for name, value in kept[field].items() if name in names}
    if unknown:
        warnings.warn(
            f"Unexpected keyword arguments {sorted(unknown)} for class {cls.__name__}, these are ignored. The file may be "
            "of a later version of hf_qst or PEFT",
            stacklevel=3,
        )
    return kept
