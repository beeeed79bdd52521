"""Folders of saved models: written whole or not at all, and checked before anything is loaded from them.

transformers fills a missing tensor with random values and passes over an extra one. The manifest beside the weights
says what every file must hold.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable

from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file

from hf_qst.saved.manifest import (
    CheckpointError,
    build,
    check,
    check_settings,
    describe_settings,
    load_json,
    read_tensors,
    require_entry,
    tensor_name,
)
from hf_qst.saved.model_card import LIBRARY, complete_card
from hf_qst.saved.whole_files import whole_files, write_text

MANIFEST_NAME = "hf_qst_manifest.json"
MANIFEST_VERSION = 1
INDEX_NAME = "model.safetensors.index.json"
# What transformers would load from a folder in place of, or beside, the files of the manifest.
_WEIGHTS = re.compile(r"(pytorch_)?model\b.*\.(safetensors|bin)(\.index\.json)?")
# The modules are compared by themselves, with an error that names the module; a wrong type is refused before.
_FREE_SETTINGS = frozenset(
    ("_name_or_path", "model_type", "reshaped_modules", "saved_class", "transformers_version", "transformers_weights")
)
_TO_CHANGE = "To change a setting on purpose, pass it to from_pretrained, and save the model again."
_CARD_MARK = "<!-- hf_qst reshaped model -->"
_CARD = f"""
{_CARD_MARK}
## How to load

Some modules of this model have other shapes than their architecture's. The `hf_qst` package, which registers itself
with the Auto classes when it is imported, builds them:

```python
import hf_qst  # noqa: F401  (without it transformers does not know the model type)
{{imports}}

model = {{loader}}.from_pretrained("path/of/this/folder")  # or the name of its repository
```
"""


def complete_folder_card(directory: str, config, how_to_load: tuple[str, str], written_to: str | None = None) -> None:
    """Put how to load a model into the README of its folder, and what the hub wants to know.

    Args:
        directory (`str`): the folder.
        config: the model's, a `ReshapedConfig`.
        how_to_load (`tuple[str, str]`): import lines and the class that loads the folder.
        written_to (`str`, *optional*): another folder to write the README to.
    """
    imports, loader = how_to_load
    kinds = sorted({description["kind"] for description in config.reshaped_modules.values()})
    metadata: dict[str, object] = {"library_name": LIBRARY, "tags": [LIBRARY, *kinds]}
    if config.reshaped_from is not None:
        metadata["base_model"] = config.reshaped_from
    if loader == "AutoModelForCausalLM":
        metadata["pipeline_tag"] = "text-generation"
    complete_card(directory, _CARD_MARK, _CARD.format(imports=imports, loader=loader), metadata, written_to)


def write_folder(save: Callable[[str], None], directory: str, config, how_to_load: tuple[str, str]) -> None:
    """Save a model's folder so that `directory` holds all of it or is left as it was.

    Args:
        save (`Callable[[str], None]`):
            Writes configuration and weights into the empty folder it is given.
        directory (`str`):
            Where they go. Files of another name, such as a tokenizer's, stay; weights of an earlier save do not.
        config (`ReshapedConfig`):
            Of the model, with the descriptions that are kept in the manifest too.
        how_to_load (`tuple[str, str]`):
            Import lines and the class that loads the folder, for the model card.

    Raises:
        CheckpointError: a tensor holds NaN or infinity, or no safetensors file was written.
    """
    created = not os.path.isdir(directory)
    os.makedirs(directory, exist_ok=True)
    try:
        with whole_files(directory, replaced=_WEIGHTS.fullmatch) as staging:
            save(staging)
            names = sorted(name for name in os.listdir(staging) if name.endswith(".safetensors"))
            if not names:
                raise CheckpointError(f"{directory}: nothing was saved as safetensors, the only format with a manifest")
            files = {name: build(read_tensors(os.path.join(staging, name)), {})["tensors"] for name in names}
            settings = describe_settings(load_json(os.path.join(staging, CONFIG_NAME)), _FREE_SETTINGS)
            manifest = {
                "version": MANIFEST_VERSION,
                "modules": config.reshaped_modules,
                "files": files,
                "settings": settings,
            }
            write_text(os.path.join(staging, MANIFEST_NAME), json.dumps(manifest, indent=1, sort_keys=True) + "\n")
            complete_folder_card(directory, config, how_to_load, staging)
    except BaseException:
        if created:
            with contextlib.suppress(OSError):  # something else was put there meanwhile
                os.rmdir(directory)
        raise


def check_folder(source: str, modules: dict, **hub) -> set[str]:
    """Check a saved model against its manifest; returns the names of its tensors.

    Args:
        source (`str`):
            Folder or repository, as `from_pretrained` takes it.
        modules (`dict`):
            The descriptions in the configuration that the model will be built from.
        hub:
            `revision`, `subfolder`, `token` and the like.

    Raises:
        CheckpointError: naming the file and the tensor or module that is not what was saved.
    """
    manifest_file = _locate(source, MANIFEST_NAME, hub)
    manifest = load_json(manifest_file)
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if version != MANIFEST_VERSION:
        raise CheckpointError(
            f"{manifest_file} is of version {version!r}, this hf_qst reads {MANIFEST_VERSION}; update it"
        )
    _validate(manifest, manifest_file)
    _check_modules(manifest["modules"], modules, source)
    if "settings" in manifest:  # folders of version 0.1 have none
        values = load_json(_locate(source, CONFIG_NAME, hub))
        check_settings(manifest["settings"], values, os.path.join(source, CONFIG_NAME), _TO_CHANGE)
    files = manifest["files"]
    for name, tensors in files.items():
        check({"tensors": tensors}, read_tensors(_locate(source, name, hub)), file=name)
    if len(files) > 1:
        _check_index(load_json(_locate(source, INDEX_NAME, hub)), files)
    for name in sorted(set(os.listdir(os.path.dirname(manifest_file))) - {*files, INDEX_NAME}):
        if _WEIGHTS.fullmatch(name):
            raise CheckpointError(
                f"{os.path.join(source, name)} is not in the manifest; remove it or save the model again"
            )
    return {name for tensors in files.values() for name in tensors}


def _locate(source: str, name: str, hub: dict) -> str:
    path = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub)
    if path is None:
        raise CheckpointError(
            f"{os.path.join(source, name)} is missing; a folder of a model with changed shapes is written whole by the "
            "model's save_pretrained and copied with all its files"
        )
    return path


def _validate(manifest: dict, path: str) -> None:
    for part in ("modules", "files"):
        if not isinstance(manifest.get(part), dict):
            raise CheckpointError(f"{path} is damaged: {part} is {manifest.get(part)!r:.60}")
    for file, tensors in manifest["files"].items():
        if not isinstance(tensors, dict) or os.path.basename(file) != file:
            raise CheckpointError(f"{path} is damaged: of file {file!r} it says {tensors!r:.60}")
        for name, entry in tensors.items():
            require_entry(name, entry, path)


def _check_modules(saved: dict, found: dict, source: str) -> None:
    for path in sorted({*saved, *found}):
        if saved.get(path) != found.get(path):
            raise CheckpointError(
                f"{source}: config.json describes module {path!r} as {found.get(path)}, saved was {saved.get(path)}"
            )


def _check_index(index: dict, files: dict) -> None:
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{INDEX_NAME} is damaged: it does not list the file of each tensor")
    listed = {tensor_name(name): file for name, file in weight_map.items()}
    held = {name: file for file, tensors in files.items() for name in tensors}
    if wrong := sorted({name for name, _ in listed.items() ^ held.items()}):
        raise CheckpointError(
            f"{INDEX_NAME}: tensor {wrong[0]!r} is listed in {listed.get(wrong[0])}, saved was {held.get(wrong[0])}"
        )
