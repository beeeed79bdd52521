"""Benchmarks and examples use what a user can: exported names, and nobody's internals."""

import ast
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("hf_qst", "hf_qst_kernels", "hf_qst_plugins")
FILES = sorted(path for folder in ("benchmarks", "examples") for path in (ROOT / folder).rglob("*.py"))


def imports(tree):
    """(module, imported name or None, name in the file) of every import, those inside of functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None, alias.asname or alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from ((node.module, alias.name, alias.asname or alias.name) for alias in node.names)


def is_exported(path, module, name):
    if path.is_relative_to(ROOT / "benchmarks" / "kernels") and module.split(".")[0] == "hf_qst_kernels":
        return True  # measures and tunes the files of that package one by one
    spec = find_spec(module)
    return spec.submodule_search_locations is not None and (name is None or name in import_module(module).__all__)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_public_names_are_used(path):
    tree = ast.parse(path.read_text())
    ours = set()
    for module, name, local in imports(tree):
        package = module.split(".")[0]
        assert package != "tests"
        assert package != "benchmarks" or path.is_relative_to(ROOT / "benchmarks"), "an example imports a benchmark"
        if package in (*PACKAGES, "examples", "benchmarks"):
            ours.add(local)
            assert not (name or "").startswith("_"), f"{module}.{name}"
        if package in PACKAGES:
            assert is_exported(path, module, name), f"{module}.{name} is not exported"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours:
            assert not node.attr.startswith("_") or node.attr == "__file__", f"{node.value.id}.{node.attr}"
