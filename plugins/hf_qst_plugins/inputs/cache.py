"""The folder where token arrays and models are kept between runs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_folder() -> Path:
    """Where token arrays and models are kept: `$HF_QST_CACHE`, else `~/.cache/hf_qst`."""
    folder = Path(os.environ.get("HF_QST_CACHE") or Path.home() / ".cache" / "hf_qst")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def kept_model(name: str, save: Callable[[Path], None]) -> Path:
    """The folder of a model in the cache, which `save` fills at the first call; it is there whole or not at all."""
    folder = cache_folder() / "models" / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tmp_") as staging:
        whole = Path(staging) / name
        save(whole)
        try:
            whole.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    return folder
