"""What a file of weights must hold: names, shapes, dtypes, checksums.

PEFT loads a flipped bit, a NaN, an extra tensor or a missing one without an error. A manifest, kept in the JSON file
beside the weights, is checked when they are loaded, and the error names the tensor.

The manifest is made when an adapter's tensors are collected for saving (`remember`) and written with its configuration
(`for_directory`), because that is what both PEFT and transformers let a method do.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from hf_qst.saved.json_files import digest

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_VALUES = 2**22


class CheckpointError(ValueError):
    """A file of weights is not what its manifest says, or does not belong to this model."""


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def read_tensors(path: str) -> dict[str, torch.Tensor]:
    """The tensors of a file; the operating system reads their content when it is looked at.

    Raises:
        CheckpointError: the file is not whole.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error


def load_json(path: str) -> object:
    """The content of a JSON file.

    Raises:
        CheckpointError: the file is not whole.
    """
    with open(path, encoding="utf-8") as file:
        try:
            return json.load(file)
        except ValueError as error:
            raise CheckpointError(f"{path} is not whole: {error}") from error


def describe(tensor: torch.Tensor) -> dict:
    """Shape, dtype and SHA-256 of one tensor."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"shape": list(tensor.shape), "dtype": dtype, "sha256": hashlib.sha256(_bytes(tensor)).hexdigest()}


def tensor_name(key: str) -> str:
    """A tensor's name in the manifest, which does not depend on what saved or holds the tensor.

    PEFT and transformers save the same tensor with and without a prefix, and PEFT renames those of fully trained modules.
    """
    return re.sub(r"\.modules_to_save\.[^.]+\.", ".", key.removeprefix("base_model.model."), count=1)


def build(tensors: Mapping[str, torch.Tensor], base: Mapping[str, object]) -> dict:
    """The manifest of `tensors`, which belong to a model described by `base`.

    Raises:
        CheckpointError: a tensor holds NaN or infinity; such weights are not saved.
    """
    for name, tensor in tensors.items():
        _require_finite(name, tensor, "cannot be saved")
    described = {tensor_name(key): describe(tensor) for key, tensor in sorted(tensors.items())}
    return {"version": 1, "base": dict(base), "tensors": described}


def _require_finite(name: str, tensor: torch.Tensor, consequence: str) -> None:
    # In parts: a whole one would take more memory than the tensor.
    parts = tensor.detach().reshape(-1).split(_VALUES) if tensor.is_floating_point() else ()
    if not all(torch.isfinite(part).all() for part in parts):
        raise CheckpointError(f"tensor {name!r} holds NaN or infinite values and {consequence}")


def check(
    manifest: Mapping, tensors: Mapping[str, torch.Tensor], file: str = WEIGHTS_NAME, container: str = ""
) -> None:
    """Check every tensor of a loaded file against its manifest.

    Args:
        manifest: what `build` gave.
        tensors: the content of the file.
        file: its name.
        container: name of the module that holds the method's own tensors, to which a partial manifest is limited.

    Raises:
        CheckpointError: naming the file and the first tensor that is missing, extra, of another shape or dtype, not
            finite, or of another content.
    """
    expected = {tensor_name(key): entry for key, entry in manifest["tensors"].items()}
    tensors = {tensor_name(key): tensor for key, tensor in tensors.items()}
    extra = tensors.keys() - expected.keys()
    if manifest.get("partial"):
        extra = {name for name in extra if container in name.split(".")}
    for problem, names in (("is missing", expected.keys() - tensors), ("is not in its manifest", extra)):
        if names:
            raise CheckpointError(f"{file}: tensor {min(names)!r} {problem} ({len(names)} such tensors)")
    for name, want in expected.items():
        tensor = tensors[name]
        if list(tensor.shape) != want["shape"]:
            raise CheckpointError(f"{file}: tensor {name!r} has shape {list(tensor.shape)}, saved was {want['shape']}")
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype != want["dtype"]:
            raise CheckpointError(f"{file}: tensor {name!r} has dtype {dtype}, saved was {want['dtype']}")
        _require_finite(name, tensor, f"{file} is damaged")
        if describe(tensor)["sha256"] != want["sha256"]:
            raise CheckpointError(f"{file}: tensor {name!r} does not have the content that was saved (checksum)")


def validate(manifest: object, file: str = CONFIG_NAME) -> None:
    """Check that a manifest read from `file` has the form of one.

    Raises:
        CheckpointError: naming the file and the part that is missing or of another type.
    """

    def require(holder: object, name: str, kind: type | tuple[type, ...], place: str) -> object:
        if not isinstance(holder, dict) or name not in holder:
            raise CheckpointError(f"{file} is damaged: its manifest has no {place}")
        if not isinstance(holder[name], kind) or isinstance(holder[name], bool):
            raise CheckpointError(f"{file} is damaged: {place} of its manifest is {holder[name]!r:.60}")
        return holder[name]

    base = require(manifest, "base", dict, "base")
    for name, value in base.items():
        if not isinstance(value, (str, int, type(None))):
            raise CheckpointError(f"{file} is damaged: base/{name} of its manifest is {value!r:.60}")
    for name, entry in require(manifest, "tensors", dict, "tensors").items():
        require_entry(name, entry, file)


def require_entry(name: str, entry: object, file: str) -> None:
    """Check that what a manifest in `file` says of tensor `name` has the form of `describe`.

    Raises:
        CheckpointError: naming the file and the tensor.
    """
    whole = (
        isinstance(entry, dict)
        and isinstance(entry.get("dtype"), str)
        and isinstance(entry.get("sha256"), str)
        and isinstance(entry.get("shape"), list)
        and all(isinstance(size, int) for size in entry["shape"])
    )
    if not whole:
        raise CheckpointError(f"{file} is damaged: its manifest says {entry!r:.60} of tensor {name!r}")


def describe_settings(values: Mapping[str, object], free: Collection[str]) -> dict[str, str]:
    """A checksum of each setting of a JSON file, but of those in `free`, which others may write."""
    return {name: digest(value)[:16] for name, value in sorted(values.items()) if name not in free}


def check_settings(saved: object, values: Mapping[str, object], file: str, remedy: str) -> None:
    """Check the settings of a file against the checksums that were saved with it.

    Args:
        saved: what `describe_settings` gave; settings without a checksum, of another version, are not checked.
        values: the settings that were read; a missing one is None.
        file: where they stand.
        remedy: how to change one on purpose.

    Raises:
        CheckpointError: naming the file and the first setting that is not the one that was saved.
    """
    if not isinstance(saved, dict):
        raise CheckpointError(f"{file} is damaged: its manifest holds no checksums of the settings")
    for name, expected in saved.items():
        if digest(values.get(name))[:16] != expected:
            raise CheckpointError(
                f"{file}: {name} is {values.get(name)!r:.80}, which is not what was saved with the weights. {remedy}"
            )


def entries_below(manifest: Mapping, path: str) -> dict[str, dict]:
    """The entries of the tensors below the module `path`, by their names in it."""
    prefix = f"{path}."
    return {k.removeprefix(prefix): entry for k, entry in manifest["tensors"].items() if k.startswith(prefix)}


def check_in_memory(expected: Mapping[str, Mapping], network: nn.Module) -> bool:
    """Check a network that transformers' own `load_adapter` filled, which shows a method no file or state dict.

    Its loader marks every tensor it sets, and weights that came another way carry no mark. Tensors that were certainly
    written to since, or cast, cannot be compared and are passed over. Not every way of writing can be seen, so this must
    be called before anything trains.

    Args:
        expected: entries of a manifest by the names of the tensors in `network`.
        network: what was loaded.

    Returns:
        Whether there were tensors to check.

    Raises:
        CheckpointError: naming the first tensor that is missing, not finite, or of another content.
    """
    parameters = dict(network.named_parameters())
    loaded = {
        name: tensor
        for name, tensor in [*parameters.items(), *network.named_buffers()]
        if getattr(tensor, "_is_hf_initialized", False)
    }
    if not loaded:
        return False
    missing = parameters.keys() - loaded.keys()
    if missing:
        raise CheckpointError(f"{WEIGHTS_NAME}: tensor {min(missing)!r} is missing ({len(missing)} such tensors)")
    for name in loaded.keys() & expected.keys():
        tensor = loaded[name]
        if tensor._version > 0:
            continue
        _require_finite(name, tensor, f"{WEIGHTS_NAME} is damaged")
        found = describe(tensor)
        if found["dtype"] == expected[name]["dtype"] and found != expected[name]:
            raise CheckpointError(
                f"{WEIGHTS_NAME}: tensor {name!r} does not have the content that was saved (checksum), or it was written "
                "to before the model first ran"
            )
    return True


def check_base(manifest: Mapping, base: Mapping[str, object]) -> None:
    """Check that weights saved for one base are loaded onto one of the same kind.

    Raises:
        CheckpointError: naming what differs and both values.
    """
    for name, saved in manifest["base"].items():
        if base.get(name) != saved:
            raise CheckpointError(
                f"{CONFIG_NAME}: this adapter was saved for a base with {name} {saved!r}, the given model has "
                f"{base.get(name)!r}"
            )


def remember(config, tensors: Mapping[str, torch.Tensor], base: Mapping[str, object]) -> None:
    """Keep the manifest of tensors that are about to be saved until their configuration is."""
    config._pending_manifest = build(tensors, base)


def for_directory(config, directory: str) -> dict | None:
    """The manifest to save beside the weights in `directory`, or None when nothing is known of them.

    PEFT adds fully trained modules (`modules_to_save`) to the file after a method's own tensors were collected. When
    the file on disk holds exactly the remembered tensors and more, the manifest covers all of it; transformers writes
    its file after the configuration, and then the manifest says that it is `partial`: the file may hold modules
    beside the method's own.

    What was remembered serves once. A configuration that is saved by itself keeps the manifest it was loaded with only
    where the file beside it is that file: the weights may have been trained since.
    """
    pending = config.__dict__.pop("_pending_manifest", None)
    known = config.manifest if pending is None else pending
    path = os.path.join(directory, WEIGHTS_NAME)
    if known is not None and os.path.exists(path):
        found = {tensor_name(key): describe(tensor) for key, tensor in read_tensors(path).items()}
        if all(found.get(tensor_name(key)) == entry for key, entry in known["tensors"].items()):
            return {**known, "tensors": dict(sorted(found.items()))}
    return None if pending is None else {**pending, "partial": True}
