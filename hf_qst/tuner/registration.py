"""Registers the project's methods with PEFT.

PEFT has no plugin mechanism for a third party's method. Its tuners are looked up in three dictionaries whose keys are
members of the `PeftType` enum, a `str` enum, so a string of the same value serves as a key and the one of an
`adapter_config.json` finds it. `PeftType` itself is left alone: adding a member to it would break unpickling in processes
that have not imported this package.

Without `import hf_qst` none of our code runs, and PEFT and transformers print a name they do not know. Saved files
therefore carry the remedy inside that name.
"""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from hf_qst.tuner.reading import check_what_peft_reads

IMPORT_REMINDER = "run 'import hf_qst' before loading"
"""Part of the names in saved files that a process without this package looks up in vain and prints."""

METHODS: dict[str, tuple[type, type]] = {}
"""Configuration and tuner class of every registered method by the name of its PEFT type."""


class HfQstPeftType(str):
    """The `peft_type` of a method of this package. PEFT asks for the `value` of what is an enum's member there."""

    __slots__ = ()

    @property
    def value(self) -> str:
        return str(self)


def register_method(config_class: type, tuner_class: type) -> None:
    """Make a method known to `get_peft_model`, `PeftModel.from_pretrained` and transformers' adapter methods.

    Registering the same class twice does nothing.

    Args:
        config_class: a `MethodConfig`; its `method` is the name of the PEFT type.
        tuner_class: a `ManifestTuner`.

    Raises:
        RuntimeError: PEFT already has a method of that name which is not ours.
    """
    peft_type = HfQstPeftType(config_class.method)
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
    if known is config_class:
        return
    if known is not None:
        raise RuntimeError(
            f"PEFT already has a method {peft_type.value!r} ({known.__module__}.{known.__qualname__}); the one of hf_qst "
            "cannot be registered beside it. Use a PEFT release without it, or PEFT's own."
        )
    PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_class
    PEFT_TYPE_TO_CONFIG_MAPPING[saved_name(peft_type)] = config_class
    PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = tuner_class
    # transformers' delete_adapter builds the prefix as the lower-case name plus "_".
    PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = tuner_class.prefix
    METHODS[peft_type] = config_class, tuner_class
    check_what_peft_reads(_container_of)


def _container_of(saved: str) -> str | None:
    """Name of the modules that hold a method's own tensors, by the `peft_type` in a file; None for another's method."""
    known = METHODS.get(saved.partition(" ")[0])
    return None if known is None else known[1]._container()


def saved_name(peft_type: str) -> str:
    """The `peft_type` of an `adapter_config.json`: what PEFT's KeyError prints in a process without this package."""
    return f"{peft_type} ({IMPORT_REMINDER})"
