"""Cards (README.md) of saved folders: metadata that the hub accepts, and a section on how to load them."""

from __future__ import annotations

import os
from collections.abc import Mapping

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import HFValidationError, validate_repo_id

from hf_qst.saved.whole_files import write_text

LIBRARY = "hf_qst"
_OF_BASE = "base_model:"
_OF_OTHERS = {"library_name": "transformers"}
"""Values that a card has from transformers' template, which does not know of this package."""


def hub_name(name: str | None) -> str | None:
    """`name` if it can be that of a repository on the hub, None if it is a folder's."""
    return name if name and not os.path.exists(name) and _is_repository(name) else None


def _is_repository(name: str) -> bool:
    """Whether the hub takes `name` for that of a repository."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def complete_card(
    directory: str, mark: str, section: str, metadata: Mapping[str, object], written_to: str | None = None
) -> None:
    """Put a section into the README of a folder, once, and fill in the metadata that it lacks.

    The hub refuses a card whose `base_model` is no name of a repository, such as the path that PEFT writes there, so
    that is taken out. Metadata that cannot be read are left as they are.

    Args:
        directory: the folder whose README is completed.
        mark: a line of the section by which it is recognised.
        section: its text.
        metadata: values of the card's head; those that are there already stay, and tags are added to.
        written_to: another folder to write the README to.
    """
    path, text = os.path.join(directory, "README.md"), ""
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            text = file.read()
    completed = _with_metadata(text if mark in text else text + section, metadata)
    if completed != text:
        write_text(os.path.join(written_to or directory, "README.md"), completed)


def _with_metadata(text: str, metadata: Mapping[str, object]) -> str:
    try:
        card = ModelCard(text if text.lstrip().startswith("---") else f"---\n{{}}\n---\n{text}")
    except (ValueError, yaml.YAMLError):
        return text
    before, data = card.data.to_dict(), card.data
    if isinstance(base := data.get("base_model"), str) and not _is_repository(base):
        data["base_model"] = None
    tags = [*(data.get("tags") or []), *metadata.get("tags", ())]
    data["tags"] = list(dict.fromkeys(tag for tag in tags if _is_valid(tag)))
    for name, value in metadata.items():
        if data.get(name) in (None, _OF_OTHERS.get(name)):
            data[name] = value
    return text if data.to_dict() == before else str(card)


def _is_valid(tag: str) -> bool:
    """PEFT also writes the base into a tag, `base_model:adapter:` and its name or path."""
    return not tag.startswith(_OF_BASE) or _is_repository(tag.rpartition(":")[2])
