"""Where things live, which way dependencies point, and what importing the package does and costs."""

import ast
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import hf_qst
from hf_qst import QSTConfig

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "hf_qst": ROOT / "hf_qst",
    "hf_qst_kernels": ROOT / "kernels" / "hf_qst_kernels",
    "hf_qst_plugins": ROOT / "plugins" / "hf_qst_plugins",
}
MAY_IMPORT = {
    "hf_qst_kernels": set(),
    "hf_qst": {"hf_qst_kernels"},
    "hf_qst_plugins": {"hf_qst", "hf_qst_kernels"},
}


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "plugins")))}
        | environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


@pytest.mark.parametrize("folder", ["kernels", "plugins", "tests", "tests/hf_qst", "tests/kernels"])
def test_containers_are_no_packages(folder):
    """A `kernels` package at the root would shadow the Hugging Face library of that name for transformers."""
    assert not (ROOT / folder / "__init__.py").exists()


def imported_at_the_top(path):
    """Top-level names of the modules a file imports when it is imported itself."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_dependencies_point_one_way(package):
    files = list(PACKAGES[package].rglob("*.py"))
    assert files
    for path in files:
        ours = imported_at_the_top(path) & (PACKAGES.keys() | {"tests", "examples", "benchmarks"})
        assert ours <= MAY_IMPORT[package] | {package}, path


def test_files_stay_short():
    folders = [*PACKAGES.values(), ROOT / "tests"]
    for path in (p for folder in folders for p in folder.rglob("*.py")):
        assert len(path.read_text().splitlines()) < 500, path


@pytest.mark.slow
def test_import_costs_little_over_peft():
    code = "import time, peft; start = time.perf_counter(); import hf_qst; print(time.perf_counter() - start)"
    # A busy machine can only make it slower, so the first figure below the limit decides.
    assert any(float(python(code)) < 0.3 for _ in range(3))


def test_import_has_no_side_effects():
    code = """
import os, sys
import peft, transformers
before, types, loaded = dict(os.environ), list(peft.PeftType), set(sys.modules)
import hf_qst
import torch
assert dict(os.environ) == before
assert list(peft.PeftType) == types
assert not torch.cuda.is_initialized()
print(sorted({m.split(".")[0] for m in set(sys.modules) - loaded} & {"triton", "bitsandbytes", "trl", "datasets", "hf_qst_plugins"}))
"""
    assert python(code) == "[]"


def test_every_public_name_is_there():
    assert all(hasattr(hf_qst, name) for name in hf_qst.__all__)
    assert set(hf_qst.__all__) <= set(dir(hf_qst))
    with pytest.raises(AttributeError, match="no attribute 'QTSConfig'"):
        hf_qst.QTSConfig  # noqa: B018


def test_unpickled_config_registers_the_method():
    reader = f"""
import pickle, peft
config = pickle.loads(bytes.fromhex("{pickle.dumps(QSTConfig(r=4)).hex()}"))
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
print(config.r, PEFT_TYPE_TO_TUNER_MAPPING["QST"].__name__)
"""
    assert python(reader) == "4 QSTModel"
