"""The settings of a run as JSON, for the header of a samples file. Runs differ if any setting differs by value."""

from __future__ import annotations

import copyreg
import enum
import functools
import hashlib
import inspect
import json
import math
import types
from collections.abc import Mapping
from itertools import chain
from pathlib import PurePath

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

LONGEST_SHOWN = 2000
"""The header shows an object's values up to this many characters, else a digest of them."""
VALUES_READ = 64
"""Elements of each tensor in a model's digest: enough to tell checkpoints apart, few enough for any model."""
# Fields of an adapter's config that loading changes and that no output depends on.
_NOT_THE_FUNCTION = {"inference_mode", "base_model_name_or_path", "revision", "peft_version", "auto_mapping"}


def digest(data: bytes | str) -> str:
    """The first 16 hexadecimal digits of the SHA-256."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()[:16]


def canonical(value: object) -> str:
    """JSON text with sorted keys, the same for equal values."""
    return json.dumps(value, sort_keys=True)


def model_settings(model, inside: tuple[int, ...] = ()) -> dict:
    """Name, adapters, generation config, a replaced `generate`, and a digest of the weights."""
    configs = getattr(model, "peft_config", None) or {}
    active = getattr(model, "active_adapters", None)
    name = getattr(model, "name_or_path", "") or type(model).__name__
    return {
        "name": " + ".join([name, *(f"{adapter}={config.peft_type}" for adapter, config in configs.items())]),
        "adapters": {
            adapter: {
                key: described(value, inside)
                for key, value in sorted(config.to_dict().items())
                if key not in _NOT_THE_FUNCTION
            }
            for adapter, config in configs.items()
        },
        "active_adapters": list(active() if callable(active) else active) if configs and active else [],
        "generation_config": described(getattr(model, "generation_config", None), inside),
        "generate": _replaced_generate(model, inside),
        "weights": weights_digest(model),
    }


def _replaced_generate(model, inside: tuple[int, ...]) -> object:
    """The function that replaces `generate` on this object, for example an installed sampling rule; None without one."""
    base = getattr(model, "base_model", None)
    for holder in (model, base, getattr(base, "model", None)):
        if holder is not None and "generate" in vars(holder):
            return described(vars(holder)["generate"], (*inside, id(model), id(holder)))
    return None


def weights_digest(module: torch.nn.Module) -> str:
    """Digest of name, dtype, shape and `VALUES_READ` evenly spaced elements of every tensor of the state dict."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        hashed.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        if tensor.device.type == "meta" or not tensor.numel():
            continue
        try:
            at = torch.linspace(0, tensor.numel() - 1, min(VALUES_READ, tensor.numel()), dtype=torch.float64)
            read = tensor.detach().reshape(-1)[at.long().to(tensor.device)].cpu()
            hashed.update(read.contiguous().view(torch.uint8).numpy().tobytes())
        except (RuntimeError, NotImplementedError, TypeError):
            continue  # a quantized tensor that cannot be indexed: only name, dtype and shape count
    return hashed.hexdigest()[:16]


def described(value: object, inside: tuple[int, ...] = ()) -> object:
    """`value` as JSON: the same in every process for equal values, different for different ones.

    Objects are described by class and attributes, `to_dict()` or pickled state; functions by code and closure. Containers
    in private attributes count as caches and are skipped, unless a constructor argument has their name.

    Args:
        inside: ids of the objects that contain this one.
    """
    plain = _plain(value)
    if plain is not None or value is None:
        return plain
    if id(value) in inside:
        return "itself"
    inside = (*inside, id(value))
    if isinstance(value, Mapping):
        return _mapping(value, inside)
    if isinstance(value, (list, tuple)):
        return [described(item, inside) for item in value]
    if isinstance(value, (set, frozenset)):
        return {"set": sorted((described(item, inside) for item in value), key=canonical)}
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return _array("tensor", value.dtype, value.shape, value.contiguous().reshape(-1).view(torch.uint8).numpy())
    if isinstance(value, np.ndarray):
        return _array("array", value.dtype, value.shape, np.ascontiguousarray(value))
    name = _plain(type(value))
    shown = {"class": name, **_contents(value, inside)}
    text = canonical(shown)
    return shown if len(text) <= LONGEST_SHOWN else {"class": name, "digest": digest(text)}


def _plain(value: object) -> object:
    """The JSON scalar for a value that one scalar describes; else None."""
    if isinstance(value, enum.Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else repr(float(value))  # NaN differs from itself
    if isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (bytes, bytearray)):
        return f"bytes {digest(bytes(value))}"
    if isinstance(value, (torch.dtype, torch.device, PurePath)):
        return str(value)
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    return value.__name__ if isinstance(value, types.ModuleType) else None


def _mapping(value: Mapping, inside: tuple[int, ...]) -> dict:
    if all(isinstance(key, str) for key in value):
        return {key: described(value[key], inside) for key in sorted(value)}
    pairs = [[described(key, inside), described(item, inside)] for key, item in value.items()]
    return {"pairs": sorted(pairs, key=canonical)}


def _array(kind: str, dtype: object, shape: tuple, values: np.ndarray) -> dict:
    return {kind: str(dtype), "shape": list(shape), "digest": digest(values.tobytes())}


def _contents(value: object, inside: tuple[int, ...]) -> dict:
    """The contents of an object, which tell it from others of its class."""
    if isinstance(value, types.FunctionType):
        held = [value.__defaults__, value.__kwdefaults__, inspect.getclosurevars(value).nonlocals]
        return {"function": value.__qualname__, "code": _code(value.__code__), "holds": described(held, inside)}
    if isinstance(value, types.MethodType):
        return {"self": described(value.__self__, inside), "function": described(value.__func__, inside)}
    if isinstance(value, types.BuiltinFunctionType):
        return {"function": value.__qualname__}
    if isinstance(value, PreTrainedModel):
        return model_settings(value, inside)
    if isinstance(value, PreTrainedTokenizerBase):
        return {"name": value.name_or_path, "vocabulary": digest(canonical(value.get_vocab()))}
    if isinstance(value, torch.nn.Module):
        return {"weights": weights_digest(value)}
    if callable(getattr(type(value), "to_dict", None)):
        attributes = {key: item for key, item in value.to_dict().items() if item is not None}
        attributes.pop("transformers_version", None)
        return {"attributes": described(attributes, inside)}
    return {"attributes": described(_state(value), inside)}


def _code(code: types.CodeType) -> str:
    """A digest of the code without file name and line numbers."""
    constants = [_code(item) if isinstance(item, types.CodeType) else repr(item) for item in code.co_consts]
    return digest(canonical([code.co_code.hex(), code.co_names, code.co_varnames, code.co_freevars, constants]))


def _state(value: object) -> object:
    """The attributes of an object, else its pickled state; None if it has neither."""
    own = getattr(type(value), "__getstate__", None)
    if own is not None and own is not getattr(object, "__getstate__", None):
        return value.__getstate__()
    slots = chain.from_iterable(_slots(base) for base in type(value).__mro__)
    attributes = {name: getattr(value, name) for name in slots if hasattr(value, name)} | getattr(value, "__dict__", {})
    if attributes:
        arguments = _constructor_arguments(type(value))
        return {name: item for name, item in attributes.items() if not _is_cache(name, item, arguments)}
    reduce = copyreg.dispatch_table.get(type(value), lambda it: it.__reduce_ex__(2))
    try:
        reduced = reduce(value)
    except TypeError:  # not picklable: a lock, an open file
        return None
    return reduced if isinstance(reduced, str) else list(reduced[1:3])


def _slots(base: type) -> tuple[str, ...]:
    slots = base.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


@functools.cache
def _constructor_arguments(kind: type) -> frozenset[str]:
    try:
        return frozenset(inspect.signature(kind.__init__).parameters)
    except (TypeError, ValueError):  # a class written in C
        return frozenset()


def _is_cache(name: str, item: object, arguments: frozenset[str]) -> bool:
    return name.startswith("_") and isinstance(item, (dict, list, set)) and name.lstrip("_") not in arguments
