"""What the configurations of all methods share: checks that name the field, what is not saved, how they are saved."""

from __future__ import annotations

import json
import math
import os
from dataclasses import MISSING, dataclass, field, fields
from typing import ClassVar

from peft.config import PeftConfig

from hf_qst.saved import manifest
from hf_qst.saved.model_card import LIBRARY, complete_card, hub_name
from hf_qst.saved.whole_files import whole_files, write_text
from hf_qst.tuner.registration import HfQstPeftType, saved_name

BUDGET_SCOPES = ("targets", "model")
"""What a `keep_ratio` is a part of: the weights a method may change, or all parameters of the model."""

NOT_OF_THE_ADAPTER = frozenset(
    ("auto_mapping", "base_model_name_or_path", "inference_mode", "manifest", "peft_type", "peft_version", "revision")
)
"""Entries of an `adapter_config.json` that may be changed after saving: where the base lies, and what PEFT writes."""
_TO_CHANGE = "Undo the edit. To change a setting on purpose, set it on what PeftConfig.from_pretrained gives, and pass that as config."

CARD_MARK = "<!-- hf_qst usage -->"
CARD_TEXT = f"""
{CARD_MARK}
## How to load

This adapter is of the `hf_qst` package, which registers its methods with PEFT when it is imported:

```python
import hf_qst  # noqa: F401  (without it PEFT raises a KeyError)
from peft import PeftModel

# `base_model` is a loaded model, the other a folder or the name of a repository
model = PeftModel.from_pretrained(base_model, "path/of/this/folder")
```

{{remark}}
"""


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclass
class MethodConfig(PeftConfig):
    """A configuration that is saved with the manifest of the weights beside it.

    Args:
        init_weights (`bool`):
            How a new adapter starts, as in PEFT's own methods: True is the method's own start, False a random one whose
            outputs differ from the base's, for tests and experiments.
        manifest (`dict`, *optional*): filled in on saving: names, shapes, dtypes and checksums of the tensors.
    """

    init_weights: bool = field(default=True, metadata={"help": "True: the method's start; False: a random one."})
    manifest: dict | None = field(
        default=None,
        repr=False,
        compare=False,
        metadata={"help": "What the saved weights must be; written by save_pretrained, checked when they are loaded."},
    )

    method: ClassVar[str]
    """Name of the method's PEFT type."""
    not_saved: ClassVar[tuple[str, ...]] = ()
    """Fields with data or models, of use while the adapter is made."""
    card_remark: ClassVar[str] = ""
    """What the card of a saved adapter says of its method."""

    memory_options: ClassVar[dict[str, object] | None] = None
    """Fields and the values of them that take least memory; None where gradient checkpointing is what saves it."""

    def planned_model(self, model, inference: bool):
        """For a plan: the model that runs, made of an empty one; None for what `get_peft_model` makes."""
        return None

    def planned_work(self, model, rows: int, tokens: int) -> dict[str, int] | None:
        """For a plan: bytes of what is done instead of training steps, by what they are for; None for training."""
        return None

    def __new__(cls, *args, **values):
        """Check what a file says of itself, while its values are as they stood there and before any is looked at."""
        if (found := values.get("manifest")) is not None:
            manifest.validate(found)
            if "settings" in found:
                defaults = {f.name: f.default_factory() for f in fields(cls) if f.default_factory is not MISSING}
                values = {f.name: f.default for f in fields(cls)} | defaults | values
                manifest.check_settings(found["settings"], values, manifest.CONFIG_NAME, _TO_CHANGE)
        return super().__new__(cls)

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = HfQstPeftType(self.method)
        self._require("init_weights", isinstance(self.init_weights, bool), "True or False")

    def _require(self, name: str, holds: bool, accepted: str) -> None:
        if not holds:
            raise ValueError(f"{type(self).__name__}.{name} must be {accepted}, got {getattr(self, name)!r}")

    def _require_one_of(self, name: str, accepted: tuple[str, ...]) -> None:
        self._require(name, getattr(self, name) in accepted, f"one of {', '.join(accepted)}")

    def to_dict(self) -> dict:
        """The configuration as JSON-ready data, without what is not saved."""
        # asdict() deep-copies every field, so batches and models are set aside first.
        kept = {name: getattr(self, name) for name in self.not_saved}
        for name in kept:
            setattr(self, name, None)
        try:
            values = super().to_dict()
        finally:
            for name, value in kept.items():
                setattr(self, name, value)
        return {name: value for name, value in values.items() if name not in self.not_saved}

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs) -> dict:
        """The fields of a saved configuration, with `peft_type` as it is in memory."""
        values = super().from_json_file(path_json_file, **kwargs)
        if "peft_type" in values:
            values["peft_type"] = values["peft_type"].partition(" ")[0]
        return values

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Save the configuration with the manifest of the weights, and complete the model card.

        PEFT calls this after it wrote the weights, transformers before; see `hf_qst.saved.manifest`.
        """
        os.makedirs(save_directory, exist_ok=True)
        loaded = self.manifest
        self.manifest = manifest.for_directory(self, save_directory)
        try:
            with whole_files(save_directory) as staging:
                super().save_pretrained(staging, **kwargs)
                self._complete(os.path.join(staging, manifest.CONFIG_NAME))
        finally:
            self.manifest = loaded
        complete_card(save_directory, CARD_MARK, CARD_TEXT.format(remark=self.card_remark), self._card_metadata())

    def _card_metadata(self) -> dict[str, object]:
        metadata = {
            "library_name": "peft",
            "base_model": hub_name(self.base_model_name_or_path),
            "tags": [LIBRARY, self.method.lower()],
            "pipeline_tag": "text-generation" if self.task_type == "CAUSAL_LM" else None,
        }
        return {name: value for name, value in metadata.items() if value is not None}

    def _complete(self, path: str) -> None:
        """Put the saved name of the method and the checksums of the settings into an `adapter_config.json`."""
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
        values["peft_type"] = saved_name(self.peft_type)
        if values["manifest"] is not None:
            values["manifest"]["settings"] = manifest.describe_settings(values, NOT_OF_THE_ADAPTER)
        write_text(path, json.dumps(values, indent=2, sort_keys=True))
