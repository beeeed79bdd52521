"""PEFT's own tests at the installed version: fetched once from the package index, imported as `peft_tests`.

They are not part of the installed package, and not of this project either.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path

import peft
import pytest

PACKAGE = "peft_tests"


def cache_folder() -> Path:
    """Where PEFT's tests are kept, by PEFT's version."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "hf_qst" / f"peft-{peft.__version__}"


def load(name: str) -> types.ModuleType:
    """A module of PEFT's tests; the module that asks for it is skipped where they cannot be had."""
    folder = cache_folder()
    if not (folder / PACKAGE).exists():
        try:
            fetch(folder)
        except FetchError as error:
            pytest.skip(f"PEFT's own tests could not be fetched: {error}", allow_module_level=True)
    pytest.register_assert_rewrite(PACKAGE)
    # Only asked for its StableDiffusionPipeline, in `isinstance`.
    placeholder = types.ModuleType("diffusers")
    placeholder.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    absent = importlib.util.find_spec("diffusers") is None
    sys.path.insert(0, str(folder))
    if absent:
        sys.modules["diffusers"] = placeholder
    try:
        # It switches the Hub's offline mode off for models that a process sees for the first time.
        importlib.import_module(f"{PACKAGE}.testing_utils").hub_online_once = contextlib.nullcontext
        return importlib.import_module(f"{PACKAGE}.{name}")
    finally:
        sys.path.remove(str(folder))
        if absent:
            del sys.modules["diffusers"]


class FetchError(RuntimeError):
    """The package index does not answer, or its PEFT comes without tests."""


def fetch(folder: Path) -> None:
    """Put PEFT's tests into `folder`, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        command = [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--retries", "1", "--timeout", "15", "--no-deps"),
            *("--no-binary", ":all:", "--dest", temporary, f"peft=={peft.__version__}"),
        ]
        outcome = subprocess.run(command, capture_output=True, text=True)
        archives = list(Path(temporary).glob("peft-*.tar.gz"))
        if outcome.returncode or not archives:
            raise FetchError(f"pip download peft=={peft.__version__} said: {outcome.stderr.strip()[-500:]}")
        with tarfile.open(archives[0]) as archive:
            archive.extractall(temporary, filter="data")
        tests = Path(temporary) / archives[0].name.removesuffix(".tar.gz") / "tests"
        if not (tests / "testing_common.py").exists():
            raise FetchError(f"{archives[0].name} holds no tests")
        (tests / "__init__.py").touch()
        if not (folder / PACKAGE).exists():
            shutil.move(tests, folder / PACKAGE)
