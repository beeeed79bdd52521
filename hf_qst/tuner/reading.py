"""Checks every file of adapter weights that PEFT reads into a model, also when a training run is resumed.

`PeftModel.load_adapter` on an adapter that is there already, as `Trainer` calls it to resume and to load the best
checkpoint, reads the weights and not the configuration beside them. PEFT tells a method neither the file nor the folder
then, so its reading function is wrapped. Adapters of other methods pass through.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import torch
from peft import peft_model

from hf_qst.saved import manifest


def check_what_peft_reads(container_of: Callable[[str], str | None]) -> None:
    """Wrap PEFT's reading function, once.

    Args:
        container_of: gives the name of the modules that hold the tensors of the method of a saved `peft_type`, None for
            a method that is not ours.
    """
    read = peft_model.load_peft_weights
    if getattr(read, "checks_manifests", False):
        return

    @functools.wraps(read)
    def load_peft_weights(model_id, *args, **kwargs):
        tensors = read(model_id, *args, **kwargs)
        folder = os.path.join(model_id, kwargs.get("subfolder") or "")
        if kwargs.get("key_mapping") is None:
            _check(folder, tensors, container_of)
        return tensors

    load_peft_weights.checks_manifests = True
    peft_model.load_peft_weights = load_peft_weights


def _check(folder: str, tensors: dict[str, torch.Tensor], container_of: Callable[[str], str | None]) -> None:
    """Check tensors against the configuration beside their file, where there is one of our methods with a manifest.

    Raises:
        CheckpointError: naming the file and the tensor.
    """
    path = os.path.join(folder, manifest.CONFIG_NAME)
    if not os.path.isfile(path):
        return
    values = manifest.load_json(path)
    container = container_of(str(values.get("peft_type"))) if isinstance(values, dict) else None
    found = None if container is None else values.get("manifest")
    if found is None:
        return
    manifest.validate(found)
    if "settings" in found:
        manifest.check_settings(found["settings"], values, path, "Undo the edit.")
    manifest.check(found, tensors, os.path.join(folder, manifest.WEIGHTS_NAME), container)
