"""Packages that only parts of hf_qst need, and the extras of its installation that bring them."""

from __future__ import annotations

from importlib.util import find_spec

EXTRAS = {
    "bitsandbytes": "quantized",
    "datasets": "cli",
    "gguf": "gguf",
    "jsonargparse": "cli",
    "lm_eval": "evaluate",
    "matplotlib": "plots",
}
"""The extra of each such package, as in `setup.cfg`."""


def require(package: str, wanted_by: str) -> None:
    """Look for a package before work begins that needs it later.

    Args:
        package (`str`): a key of `EXTRAS`.
        wanted_by (`str`): the argument or the call that needs it, for the error.

    Raises:
        ImportError: it is not installed.
    """
    if find_spec(package) is None:
        raise ImportError(f"{wanted_by} needs {package}: pip install 'hf_qst[{EXTRAS[package]}]'")
