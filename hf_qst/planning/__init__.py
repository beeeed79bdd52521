"""What a run takes: parameters, bytes and seconds before it is launched, and bytes that a training step keeps."""

from importlib import import_module

from hf_qst.planning.saved_bytes import SavedForBackward
from hf_qst.planning.simulation import PlanError

# Loaded when they are first asked for.
_LATER = {"Plan": "planner", "cards_for": "chips", "chip_names": "chips", "plan": "planner"}

__all__ = ["PlanError", "SavedForBackward", *_LATER]


def __getattr__(name: str):
    if name in _LATER:
        return getattr(import_module(f"hf_qst.planning.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
