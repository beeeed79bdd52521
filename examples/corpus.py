"""The text the examples work on: Python source that is already on the machine.

Two corpora, both found through the running interpreter, so nothing is downloaded: the standard library, and the
installed `transformers` package. Each is split by file into a training and a held-out part by a hash of the file's
name, so that the split is the same on every machine that has the same version.

    files, held = split(stdlib_files())
    ids = tokens(files, tokenizer)                  # [n] int32, files separated by the end-of-text token
    data = BlockDataset(blocks(ids, 512))           # {"input_ids": [512], "labels": [512]} per item
    held_out_loss(model, blocks(tokens(held, tokenizer), 512))   # nats per token
"""

import ast
import hashlib
import importlib.util
import json
import os
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm.auto import tqdm

from hf_qst.saved import whole_file
from hf_qst_plugins.inputs import BlockDataset, blocks, cache_folder, held_out_loss, kept_model

__all__ = [
    "BlockDataset",
    "SourceFile",
    "blocks",
    "cache_folder",
    "held_out_loss",
    "kept_model",
    "python_files",
    "split",
    "stdlib_files",
    "tokens",
    "transformers_files",
]

MIN_BYTES, MAX_BYTES = 200, 400_000
"""Files below are empty stubs, files above are generated tables: neither looks like code someone wrote."""


class SourceFile(NamedTuple):
    """One file: its name relative to the corpus root (POSIX slashes, the same on every machine) and its text."""

    name: str
    text: str


def _cached(name: str, make: Callable[[], object], write: Callable, read: Callable) -> object:
    """The result of `make()`, from the cache when it is there; a run cut short leaves no half file in it."""
    path = cache_folder() / name
    if not path.exists():
        value = make()
        with whole_file(path) as temporary, open(temporary, "wb") as file:
            write(file, value)
    return read(path)


def _is_python(text: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the file may have invalid escapes
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def python_files(root: str | Path, exclude: Iterable[str] = ()) -> list[SourceFile]:
    """The usable `.py` files under `root`, sorted by name: UTF-8, parsed by `ast`, of `MIN_BYTES` to `MAX_BYTES`.

    `exclude` names folders or files, relative to `root`, to leave out with all they hold.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"root={str(root)!r} is not a folder; give the folder of a Python package")
    exclude = tuple(exclude)
    found: list[SourceFile] = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if any(name == part or name.startswith(part + "/") for part in exclude):
            continue
        data = path.read_bytes()
        if not MIN_BYTES <= len(data) <= MAX_BYTES:
            continue
        try:
            found.append(SourceFile(name, data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")))
        except UnicodeDecodeError:
            continue
    # Parsing tens of megabytes takes a while, and its answer depends on the texts alone: it is cached.
    key = hashlib.sha256("\0".join(f.name + "\0" + f.text for f in found).encode()).hexdigest()[:24]
    bad = _cached(
        f"unparsed-{key}.json",
        lambda: [f.name for f in tqdm(found, f"parsing {root.name}", unit="file", delay=1) if not _is_python(f.text)],
        lambda file, names: file.write(json.dumps(names).encode()),
        lambda path: set(json.loads(path.read_text())),
    )
    return [f for f in found if f.name not in bad]


def stdlib_files() -> list[SourceFile]:
    """The standard library of the running interpreter, its tests included.

    Without installed packages, the codec tables of `encodings`, and test data that is bad Python on purpose. The environment
    variable `HF_QST_STDLIB` names the folder of another version's, for the same text on machines with different Pythons.
    """
    exclude = ["site-packages", "dist-packages", "encodings", "lib2to3/tests/data", "test/encoded_modules"]
    return python_files(os.environ.get("HF_QST_STDLIB") or sysconfig.get_path("stdlib"), exclude)


def transformers_files() -> list[SourceFile]:
    """The source of the installed `transformers` package: Python too, but not like the standard library."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("transformers is not installed; it is needed for its source")
    return python_files(Path(spec.origin).parent)


def split(files: Sequence[SourceFile], held_out: float = 0.05) -> tuple[list[SourceFile], list[SourceFile]]:
    """(training files, held-out files): a file is held out when the hash of its name falls in the first `held_out`.

    Of files with the same text only the first by name stays, so that no text is on both sides.
    """
    if not 0.0 < held_out < 1.0:
        raise ValueError(f"held_out={held_out!r} is not a share; give a number between 0 and 1, both excluded")
    parts: tuple[list[SourceFile], list[SourceFile]] = ([], [])
    seen: set[str] = set()
    for file in sorted(files):
        if file.text in seen:
            continue
        seen.add(file.text)
        place = int.from_bytes(hashlib.sha256(file.name.encode()).digest()[:8], "big") / 2**64
        parts[place < held_out].append(file)
    return parts


def tokens(files: Sequence[SourceFile], tokenizer, batch: int = 64) -> np.ndarray:
    """All files' tokens in one row: [n] int32, the tokenizer's end-of-text token after each file. Cached on disk."""
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError(f"tokenizer={tokenizer.name_or_path!r} has no eos_token; one is needed between files")
    key = hashlib.sha256(json.dumps([tokenizer.backend_tokenizer.to_str(), end]).encode())
    for file in files:
        key.update(hashlib.sha256(file.text.encode()).digest())

    def make() -> np.ndarray:
        parts: list[np.ndarray] = []
        with tqdm(total=len(files), desc="tokenizing", unit="file", delay=1) as bar:
            for at in range(0, len(files), batch):
                texts = [f.text for f in files[at : at + batch]]
                # Source that spells a special token is text about it, not the token: hence split_special_tokens.
                # verbose=False: a file longer than the model's context is no mistake here, it is cut into blocks later.
                encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)
                parts += [np.array([*row, end], dtype=np.int32) for row in encoded["input_ids"]]
                bar.update(len(texts))
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)

    return _cached(f"tokens-{key.hexdigest()[:24]}.npy", make, np.save, np.load)
