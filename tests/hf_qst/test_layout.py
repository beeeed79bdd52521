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
from hf_qst.tuner import registration

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


# Folders of `hf_qst`, each of which may import those before it and the files beside it.
ORDER = ["extras", "saved", "base_model", "calibration", "planning", "tuner", "reshaped_models", "pruning", "methods"]
METHODS = {tuner_class.__module__.split(".")[1] for _, tuner_class in registration.METHODS.values()}


def modules() -> dict[str, Path]:
    """Dotted names of all files of the packages."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            name = ".".join([package, *path.relative_to(folder).with_suffix("").parts])
            found[name.removesuffix(".__init__")] = path
    return found


def imported_files(name: str, path: Path, known, inside_functions: bool = False) -> set[str]:
    """Of `known`, those that a file imports when it is imported itself, or also when its functions run."""
    found, tree = set(), ast.parse(path.read_text())
    for node in ast.walk(tree) if inside_functions else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names}
    return (found & known.keys()) - {name}


def test_no_files_import_each_other_in_a_circle():
    """Imports inside functions count: they are there to load something late, not to close a circle."""
    files = modules()
    graph = {name: imported_files(name, path, files, inside_functions=True) for name, path in files.items()}
    # A package's own file re-exports what lies in it.
    left = {name: targets for name, targets in graph.items() if name not in PACKAGES}
    while leaves := {name for name, targets in left.items() if not targets & left.keys()}:
        left = {name: targets for name, targets in left.items() if name not in leaves}
    assert not left


def test_folders_import_one_way():
    files = modules()
    assert {path.name for path in PACKAGES["hf_qst"].glob("*.py")} == {
        "__init__.py",
        "errors.py",
        "extras.py",
        "requirements.py",
        "version.py",
        "decoder_stack.py",
        "supported.py",
    }
    for name, path in files.items():
        package, *inside = name.split(".")
        if package != "hf_qst" or len(inside) < 1 or (len(inside) == 1 and not path.name.startswith("__init__")):
            continue
        for target in imported_files(name, path, files):
            other = target.split(".")[1:2]
            if not target.startswith("hf_qst.") or other == inside[:1]:
                continue
            assert ORDER.index(_place(inside[0])) > ORDER.index(_place(other[0])), (name, target)


def _place(folder: str) -> str:
    return "methods" if folder in METHODS else folder


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
