"""The versions of other packages that this one works with, as `setup.cfg` declares them; checked at import.

An environment may hold others all the same: a later `pip install` of another package only prints a warning.
"""

from __future__ import annotations

import re
import warnings
from importlib import metadata

from hf_qst.version import __version__

RANGES: dict[str, tuple[str, str | None]] = {
    "torch": ("2.9", None),
    "transformers": ("5.17", "5.24"),
    "peft": ("0.21", "0.22"),
    "accelerate": ("1.10", None),
    "safetensors": ("0.8", None),
}
"""Of each package the first version that works, and the first that was not tried."""


def check_versions(ranges: dict[str, tuple[str, str | None]] = RANGES) -> None:
    """Compare what is installed.

    Raises:
        ImportError: a package is too old. One that is newer than what was tried gets a warning, as it may work.
    """
    for package, (least, below) in ranges.items():
        try:
            installed = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # its import says so
        wanted = f"{package}>={least}" + (f",<{below}" if below else "")
        if _release(installed) < _release(least):
            raise ImportError(
                f"hf_qst {__version__} needs {wanted}, installed is {package} {installed}: pip install '{wanted}'"
            )
        if below and _release(installed) >= _release(below):
            warnings.warn(
                f"hf_qst {__version__} was tried with {wanted}, installed is {package} {installed}: if something fails, update "
                f"hf_qst, or pip install '{wanted}'",
                stacklevel=3,
            )


def _release(version: str) -> tuple[int, ...]:
    """(5, 24) of "5.24.0.dev0" and of "5.24"."""
    numbers = [int(number) for number in re.findall(r"\d+", version)]
    return tuple(numbers[:2])


check_versions()
