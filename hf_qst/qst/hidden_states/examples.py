"""The examples in a batch, each with a key of what its hidden states depend on.

An example is a row up to its last token that is no padding: what stands behind a token does not change the token's states.
Padding in front shifts the positions and belongs to the key. Of a packed row, in which `position_ids` start anew with each
sequence and there is no mask, each sequence is an example of its own if the base keeps them apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from hf_qst.qst.hidden_states.config import HiddenStateCacheError


@dataclass(frozen=True)
class Example:
    """Tokens `start` to `stop` (exclusive) of row `row` of a batch."""

    row: int
    start: int
    stop: int
    key: bytes


def examples_of(inputs: Mapping, separate: bool) -> list[Example]:
    """The examples of a batch.

    Args:
        inputs: of the decoder stack, `input_ids` [batch, seq], and `attention_mask` [batch, seq] and `position_ids`
            [batch or 1, seq] or None.
        separate: whether the base keeps the sequences of a packed row apart.
    """
    ids = _array(inputs, "input_ids", np.int64)
    mask = _array(inputs, "attention_mask", bool)
    positions = _array(inputs, "position_ids", np.int64)
    if mask is not None and mask.shape != ids.shape:
        raise HiddenStateCacheError(
            f"a hidden-state cache needs an attention_mask of the shape of input_ids {list(ids.shape)}, got {list(mask.shape)}"
        )
    if positions is not None:
        positions = np.broadcast_to(positions, ids.shape)
    found = []
    for row in range(len(ids)):
        of_row = [None if array is None else array[row] for array in (mask, positions)]
        for start, stop in _ranges(*of_row, ids.shape[1], separate):
            parts = [None if array is None else array[start:stop] for array in of_row]
            found.append(Example(row, start, stop, _key(ids[row, start:stop], *parts)))
    return found


def _array(inputs: Mapping, name: str, dtype) -> np.ndarray | None:
    value = inputs.get(name)
    if value is None:
        return None
    if not isinstance(value, torch.Tensor) or value.dim() != 2:
        what = f"shape {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise HiddenStateCacheError(f"a hidden-state cache needs {name} as a tensor [batch, seq], got {what}")
    return value.detach().cpu().numpy().astype(dtype)


def _ranges(mask, positions, length: int, separate: bool) -> Iterator[tuple[int, int]]:
    if mask is not None:
        real = np.flatnonzero(mask)
        if len(real):
            yield 0, int(real[-1]) + 1
    elif positions is not None and separate:
        # As transformers finds them for its block-diagonal mask.
        starts = [0, *(np.flatnonzero(np.diff(positions) != 1) + 1).tolist()]
        yield from zip(starts, [*starts[1:], length], strict=True)
    else:
        yield 0, length


def _key(ids: np.ndarray, mask: np.ndarray | None, positions: np.ndarray | None) -> bytes:
    whole = mask is None or bool(mask.all())
    usual = positions is None or (whole and np.array_equal(positions, np.arange(len(ids))))
    # Equal tokens have one key however the call says that there is no padding and that positions count from 0.
    digest = hashlib.blake2b(ids.tobytes(), digest_size=16)
    digest.update(bytes([whole, usual, mask is None and not usual]))
    digest.update(b"" if whole else np.packbits(mask).tobytes())
    digest.update(b"" if usual else positions.tobytes())
    return digest.digest()
