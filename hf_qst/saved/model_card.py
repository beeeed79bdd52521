"""Cards (README.md) of saved folders, completed by a section on how to load them."""

from __future__ import annotations

import os

from hf_qst.saved.whole_files import write_text


def complete_card(directory: str, mark: str, section: str, written_to: str | None = None) -> None:
    """Put a section into the README of a folder, once.

    Args:
        directory: the folder whose README is completed.
        mark: a line of the section by which it is recognised.
        section: its text.
        written_to: another folder to write the README to.
    """
    path, text = os.path.join(directory, "README.md"), ""
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            text = file.read()
    if mark not in text:
        write_text(os.path.join(written_to or directory, "README.md"), text + section)
