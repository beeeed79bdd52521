"""The kinds of module that may stand in place of an architecture's own.

A method that changes shapes registers a name and a function here. The name is what a `config.json` may say; the
function rebuilds the module from it, so a saved folder can only ever ask for code that a method registered.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping

from torch import nn
from transformers.pytorch_utils import Conv1D

Builder = Callable[[nn.Module, dict], nn.Module]

_BUILDERS: dict[str, Builder] = {}
_FINISHES: dict[str, Callable[[nn.Module], None]] = {}


class ReshapedModelError(ValueError):
    """A model with changed modules cannot be described, rebuilt or made dense."""


def register_kind(name: str, builder: Builder, finish: Callable[[nn.Module], None] | None = None) -> None:
    """Make modules of one kind savable and loadable.

    Args:
        name (`str`):
            What `module.describe()["kind"]` is for these modules.
        builder (`Callable[[nn.Module, dict], nn.Module]`):
            Gets the module of the unchanged model, on whatever device the model is being built on (meta while a
            checkpoint is loaded), and the description; returns a module with the same tensor names and shapes as the
            one that was saved. The values are filled in afterwards.
        finish (`Callable[[nn.Module], None]`, *optional*):
            Called with the base model when all its modules are in place, by `reshape_model` and when a saved model is
            built and loaded, again whenever more modules are exchanged. It is for what a kind needs around its modules and a builder
            cannot reach, such as a forward of another class for their parents. It leaves the tensors and their names
            alone. A class it gives to a module is a subclass of the module's own and names that as `plain_class`, which
            `to_dense` gives back.

    A module of a kind has two methods:

    - `describe()` returns a JSON object with its `"kind"` and whatever else, the unchanged module aside, the builder
      needs.
    - `to_dense()` returns a module of the unchanged class and shapes that computes the same.

    It must hold its linear parts as `nn.Linear` children rather than be one, because quantisation exchanges every
    `nn.Linear` for a class of its own, and its buffers (index tensors) must be persistent, because those that are not
    are lost when a model is built on meta.

    Raises:
        ReshapedModelError: another function is registered under this name.
    """
    known = _BUILDERS.setdefault(name, builder)
    if (known.__module__, known.__qualname__) != (builder.__module__, builder.__qualname__):
        raise ReshapedModelError(
            f"register_kind: the kind {name!r} is taken by {known.__module__}.{known.__qualname__}; choose another name"
        )
    if finish is not None:
        _FINISHES[name] = finish


def build_module(unchanged: nn.Module, description: dict, path: str) -> nn.Module:
    """The module that `description` says stands at `path` in place of `unchanged`.

    Raises:
        ReshapedModelError: naming the kind and the registered ones.
    """
    _require_known(description.get("kind"), path)
    return _BUILDERS[description["kind"]](unchanged, description)


def finish_modules(base: nn.Module, described: Mapping[str, dict]) -> None:
    """Do what the kinds of these modules, descriptions by path, still need when all of them are in place."""
    for kind in sorted({description["kind"] for description in described.values()} & _FINISHES.keys()):
        _FINISHES[kind](base)


def described_modules(base: nn.Module) -> dict[str, dict]:
    """Descriptions of all modules of registered kinds below `base`, by their path in it.

    Raises:
        ReshapedModelError: a module is of a kind that is not registered, or is not what `register_kind` asks for.
    """
    return {path: _checked_description(path, module) for path, module in _candidates(base)}


def _candidates(base: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in base.named_modules():
        if callable(getattr(module, "describe", None)):
            yield path, module


def _require_known(kind: object, path: str) -> None:
    if kind not in _BUILDERS:
        known = ", ".join(sorted(_BUILDERS)) or "none"
        raise ReshapedModelError(
            f"module {path!r} is of the kind {kind!r}, which is not registered; registered kinds: {known}. "
            "Import the package that brings it, or a newer hf_qst."
        )


def _checked_description(path: str, module: nn.Module) -> dict:
    try:
        description = json.loads(json.dumps(module.describe(), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ReshapedModelError(f"{type(module).__name__}.describe() of {path!r} is not JSON: {error}") from error
    _require_known(description.get("kind"), path)
    if isinstance(module, (nn.Linear, Conv1D)):
        raise ReshapedModelError(
            f"module {path!r} ({type(module).__name__}) is itself an nn.Linear or Conv1D; a kind must hold one instead"
        )
    for name, part in module.named_modules(prefix=path):
        # An architecture's own module makes such a buffer anew, from its configuration.
        if part._non_persistent_buffers_set and not type(part).__module__.startswith("transformers.models."):
            raise ReshapedModelError(
                f"buffer {name}.{min(part._non_persistent_buffers_set)} of kind {description['kind']!r} would not be "
                "saved; register it with persistent=True"
            )
    return description
