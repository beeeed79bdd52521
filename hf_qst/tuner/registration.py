"""Registers the project's methods with PEFT.

PEFT has no plugin mechanism for a third party's method. Its tuners are looked up in three dictionaries whose keys are
members of the `PeftType` enum, a `str` enum; a `str` enum of our own hashes and compares like its string value, so its
members serve as keys and the `"QST"` of an `adapter_config.json` finds them. `PeftType` itself is left alone: adding a
member to it would break unpickling in processes that have not imported this package.

Without `import hf_qst` none of our code runs, and PEFT and transformers print a name they do not know. Saved files
therefore carry the remedy inside that name.
"""

from __future__ import annotations

import enum
import json

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from hf_qst.saved.manifest import register_container
from hf_qst.saved.whole_files import write_text

IMPORT_REMINDER = "run 'import hf_qst' before loading"
"""Part of the names in saved files that a process without this package looks up in vain and prints."""


class HfQstPeftType(str, enum.Enum):
    """The PEFT types this package brings."""

    QST = "QST"
    MIXED_RANK = "MIXED_RANK"
    DISP = "DISP"


def register_method(peft_type: HfQstPeftType, config_class: type, tuner_class: type) -> None:
    """Make `peft_type` known to `get_peft_model`, `PeftModel.from_pretrained` and transformers' adapter methods.

    Registering the same class twice does nothing.

    Raises:
        RuntimeError: PEFT already has a method of that name which is not ours.
    """
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
    if known is config_class:
        return
    if known is not None:
        raise RuntimeError(
            f"PEFT already has a method {peft_type.value!r} ({known.__module__}.{known.__qualname__}); the one of hf_qst "
            "cannot be registered beside it. Use a PEFT release without it, or PEFT's own."
        )
    PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_class
    PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = tuner_class
    PEFT_TYPE_TO_CONFIG_MAPPING[saved_name(peft_type)] = config_class
    register_container(tuner_class.tuner_layer_cls.adapter_layer_names[0])
    # transformers' delete_adapter builds the prefix as the lower-case name plus "_".
    PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = tuner_class.prefix


def saved_name(peft_type: HfQstPeftType) -> str:
    """The `peft_type` of an `adapter_config.json`: what PEFT's KeyError prints in a process without this package."""
    return f"{peft_type.value} ({IMPORT_REMINDER})"


def write_saved_name(path: str, peft_type: HfQstPeftType) -> None:
    """Put the saved name of `peft_type` into an `adapter_config.json`."""
    with open(path, encoding="utf-8") as file:
        values = json.load(file)
    values["peft_type"] = saved_name(peft_type)
    write_text(path, json.dumps(values, indent=2, sort_keys=True))
