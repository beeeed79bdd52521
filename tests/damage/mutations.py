"""Ways in which saved files get damaged, drawn by a seeded generator: one change of one file of a folder.

`damage` changes bytes, tensors, JSON values or the files themselves, and says in words what it did.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

VALUES = (
    None, True, False, 0, 1, -1, 2, 3, 7, 10**6, 10**12, 10**30, -(10**30), 0.0, 0.5, -0.5, 1e-30, 1e30, math.nan, math.inf,
    "", "x", "../../etc/passwd", "\u0000", "9" * 5000, [], [0], [[[[]]]], {}, {"x": {"y": {}}}, [None] * 3,
)  # fmt: skip
"""What a JSON value is replaced by."""


def damage(folder: Path, draw: random.Random, other: Path | None = None) -> str:
    """Change one file of `folder`; `other` is a folder of the same kind with other content. Returns what was done."""
    files = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".json", ".jsonl"))
    file = draw.choice(files)
    kinds: list[Callable] = [whole_file_changes, byte_changes]
    if file.suffix == ".safetensors":
        kinds += [tensor_changes] * 4
    else:
        kinds += [json_changes] * 6
    kind = draw.choice(kinds)
    done = kind(file, draw, None if other is None else other / file.name)
    return f"{file.name}: {done}"


def byte_changes(file: Path, draw: random.Random, other: Path | None) -> str:
    """Flip, cut, insert, repeat or zero bytes."""
    content = bytearray(file.read_bytes())
    if not content:
        return "empty already"
    place = draw.randrange(len(content))
    # Half of them near the start, where a safetensors file has its header.
    if draw.random() < 0.5:
        place = draw.randrange(min(len(content), 400))
    kind = draw.choice(("flip", "cut", "insert", "zero", "repeat", "length"))
    if kind == "flip":
        content[place] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del content[place:]
    elif kind == "insert":
        content[place:place] = draw.randbytes(draw.choice((1, 8, 100)))
    elif kind == "zero":
        end = min(len(content), place + draw.choice((1, 16, 4096)))
        content[place:end] = bytes(end - place)
    elif kind == "repeat":
        content += content[place:]
    else:
        content[:8] = struct.pack("<Q", draw.choice((0, 1, 2**31, 2**62, len(content))))
    file.write_bytes(bytes(content))
    return f"{kind} at byte {place}"


def tensor_changes(file: Path, draw: random.Random, other: Path | None) -> str:
    """Change values, names, shapes and dtypes, leaving a file that is whole."""
    try:
        tensors = load_file(file)
    except SafetensorError as error:  # an earlier change
        return f"not whole already ({error})"
    names = sorted(tensors)
    name, second = draw.choice(names), draw.choice(names)
    tensor = tensors[name]
    kind = draw.choice(
        ("value", "nan", "infinite", "swap", "rename", "second name", "remove", "extra", "dtype", "shape", "order", "scale",
         "zero", "sign", "cut", "bits as integers", "of the other folder")
    )  # fmt: skip
    flat = tensor.view(-1) if tensor.is_contiguous() else tensor.reshape(-1)
    floating = tensor.is_floating_point()
    if kind in ("value", "nan", "infinite") and flat.numel():
        new = {"value": 1, "nan": math.nan, "infinite": math.inf}[kind] if floating else 1
        flat[draw.randrange(flat.numel())] += new
    elif kind == "swap":
        tensors[name], tensors[second] = tensors[second], tensors[name]
    elif kind == "rename":
        tensors[draw.choice((name + "x", "x." + name, name.replace("weight", "bias"), name.upper()))] = tensors.pop(
            name
        )
    elif kind == "second name":
        tensors[name + "_2"] = tensor.clone()
    elif kind == "remove":
        del tensors[name]
    elif kind == "extra":
        tensors[second + ".more"] = torch.ones(3)
    elif kind == "dtype":
        tensors[name] = tensor.to(draw.choice((torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8)))
    elif kind == "shape":
        tensors[name] = draw.choice((tensor[None], tensor.reshape(-1), tensor.T)).contiguous()
    elif kind == "order":
        tensors[name] = tensor.flip(0).contiguous() if tensor.dim() else tensor
    elif kind == "scale":
        tensors[name] = (tensor * 2).contiguous()
    elif kind == "zero":
        tensors[name] = torch.zeros_like(tensor)
    elif kind == "sign":
        tensors[name] = -tensor
    elif kind == "cut" and tensor.dim():
        tensors[name] = tensor[: max(0, tensor.shape[0] - 1)].clone()
    elif kind == "bits as integers" and floating:
        integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        tensors[name] = tensor.view(integers).clone()
    elif kind == "of the other folder" and other is not None and other.exists():
        theirs = load_file(other)
        tensors[name] = theirs.get(name, next(iter(theirs.values())))
    save_file({key: value.contiguous() for key, value in tensors.items()}, file, metadata={"format": "pt"})
    return f"{kind} of {name}" + (f" with {second}" if kind == "swap" else "")


def json_changes(file: Path, draw: random.Random, other: Path | None) -> str:
    """Change, remove, add or exchange values of a JSON file, or of a line of a JSONL file."""
    lines = file.read_text(errors="replace").splitlines(keepends=True) if file.suffix == ".jsonl" else None
    text = file.read_text(errors="replace") if lines is None else draw.choice(lines)
    try:
        content = json.loads(text)
    except ValueError:
        return "not JSON already"
    places = list(_places(content))
    if not places:
        return "holds nothing to change"
    holder, key, path = draw.choice(places)
    # As many changes of settings as of the long lists of tensors.
    if draw.random() < 0.5:
        holder, key, path = draw.choice([place for place in places if place[2].count("/") <= 2])
    kind = draw.choice(("replace", "replace", "nudge", "remove", "add", "exchange"))
    before = holder[key]
    if kind == "replace":
        holder[key] = draw.choice(VALUES)
    elif kind == "nudge":
        holder[key] = _nudged(before, draw)
    elif kind == "remove":
        del holder[key]
    elif kind == "add" and isinstance(holder, dict):
        holder[f"{key}_2"] = before
    elif kind == "exchange":
        with_holder, with_key, _ = draw.choice(places)
        value = with_holder[with_key] if with_key in with_holder or isinstance(with_holder, list) else before
        with_holder[with_key], holder[key] = json.loads(json.dumps(before)), json.loads(json.dumps(value))
    changed = json.dumps(content)
    if lines is None:
        file.write_text(changed)
    else:
        file.write_text("".join(changed + "\n" if line == text else line for line in lines))
    return f"{kind} of {path} (was {str(before)[:60]!r})"


def _nudged(value, draw: random.Random):
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return draw.choice((value + 1, value - 1, value * 2, -value, float(value), str(value)))
    if isinstance(value, str):
        return draw.choice((value[:-1], value + "x", value.upper(), [value]))
    if isinstance(value, list):
        return draw.choice((value[:-1], value + value[:1], value[::-1], dict(enumerate(value))))
    if isinstance(value, dict):
        return list(value)
    return 1


def _places(content, path: str = ""):
    """(holder, key, path) of every value below `content`."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield content, key, f"{path}/{key}"
        yield from _places(value, f"{path}/{key}")


def whole_file_changes(file: Path, draw: random.Random, other: Path | None) -> str:
    """Remove, empty, rename or replace a file, or let another take its place."""
    kind = draw.choice(("remove", "empty", "rename", "folder", "link", "of the other folder", "text", "longer path"))
    if kind == "remove":
        file.unlink()
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "rename":
        file.rename(file.with_name("old_" + file.name))
    elif kind == "folder":
        file.unlink()
        file.mkdir()
    elif kind == "link":
        # A cache of the hub links files out of a folder, so a link to the same content is no damage.
        target = file.parent.parent / f"elsewhere_{draw.randrange(10**9)}"
        if draw.random() < 0.5 and other is not None and other.exists():
            shutil.copy(other, target)
            file.unlink()
            os.symlink(target, file)
            return "a link to the other folder's"
        shutil.move(file, target)
        os.symlink(target, file)
    elif kind == "of the other folder" and other is not None and other.exists():
        shutil.copy(other, file)
    elif kind == "text":
        file.write_text("<html>404 not found</html>")
    elif kind == "longer path":
        shutil.copy(file, file.with_name("copy_of_" + file.name))
    return kind
