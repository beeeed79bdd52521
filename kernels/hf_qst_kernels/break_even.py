"""Where a Triton kernel was measured to beat the library, and with which configuration: one JSON table a chip.

The folder `measured` holds those of the chips that were measured. A user's own, written by `python -m benchmarks.kernels
--device cuda --tune`, lie in `user_folder()` and take precedence, decision by decision. A table is

    {"format": 1, "chip": "nvidia_h200", "versions": {...}, "decisions": {"norm_index_select": [
        {"dtype": "bfloat16", "sizes": {"rows": 1, "dim": 4096, "width": 2589},
         "triton_us": 3.1, "library_us": 5.0, "configuration": {"ROWS": 1, "BLOCK": 1024, "num_warps": 4}}, ...]}}
"""

import functools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

FORMAT = 1
SHIPPED = Path(__file__).with_name("measured")
# A measurement counts for sizes up to this factor away, each of them.
REACH = 2.0


class KernelTableError(ValueError):
    """A file of kernel measurements that is not what `python -m benchmarks.kernels --tune` writes."""

    def __init__(self, path: Path, problem: str):
        super().__init__(
            f"{path} is no table of kernel measurements: {problem}. Delete it, or write it again with "
            "`python -m benchmarks.kernels --device cuda --tune`"
        )


@dataclass(frozen=True)
class Measurement:
    """One shape on one chip: both times in microseconds, and the configuration that gave Triton's."""

    dtype: str
    sizes: Mapping[str, int]
    triton_us: float
    library_us: float
    configuration: Mapping[str, int]
    source: Path

    @property
    def wins(self) -> bool:
        return self.triton_us < self.library_us

    def distance(self, sizes: Mapping[str, int]) -> float:
        """The largest factor between a size here and there; infinite where other sizes are named."""
        if sizes.keys() != self.sizes.keys():
            return math.inf
        return max((max(a, b) / max(1, min(a, b)) for a, b in _pairs(self.sizes, sizes)), default=1.0)


def user_folder() -> Path:
    """Where a user's own tables lie: `$XDG_CACHE_HOME/hf_qst/kernels`, or `~/.cache/hf_qst/kernels` without that."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "hf_qst" / "kernels"


def chip_of(device_name: str) -> str:
    """A GPU's name as it stands in file names: `"NVIDIA H200"` -> `"nvidia_h200"`."""
    return "".join(c if c.isalnum() else "_" for c in device_name.lower()).strip("_")


def nearest(decision: str, tensor: torch.Tensor, sizes: Mapping[str, int]) -> Measurement | None:
    """
    The measurement of this kernel nearest to these sizes on the tensor's chip, `None` if none is near enough.

    Args:
        decision (`str`): an op's name, or that with `_backward`.
        tensor (`torch.Tensor`): its main input, whose device and dtype count.

    Raises:
        KernelTableError: the table for this chip is broken.
    """
    if not tensor.is_cuda:
        return None
    return _nearest(decision, str(tensor.dtype).removeprefix("torch."), tuple(sizes.items()), tensor.device)


def has_table(device: torch.device) -> bool:
    """Whether anything was measured on this chip."""
    return bool(_tables(chip_of(torch.cuda.get_device_name(device)), user_folder()))


@functools.lru_cache(maxsize=4096)
def _nearest(decision, dtype, sizes, device) -> Measurement | None:
    table = _tables(chip_of(torch.cuda.get_device_name(device)), user_folder())
    return nearest_in(table.get(decision, ()), dtype, dict(sizes))


def nearest_in(measurements, dtype: str, sizes: Mapping[str, int]) -> Measurement | None:
    """Of these measurements the one nearest to `sizes`, `None` if none is near enough."""
    reached = [m for m in measurements if m.dtype == dtype and m.distance(sizes) <= REACH]

    def far(m):
        return sum(math.log(max(a, 1) / max(b, 1)) ** 2 for a, b in _pairs(m.sizes, sizes))

    return min(reached, key=far, default=None)


def _pairs(ours: Mapping[str, int], theirs: Mapping[str, int]):
    return [(ours[name], theirs[name]) for name in ours]


@functools.cache
def _tables(chip: str, user: Path) -> dict[str, tuple[Measurement, ...]]:
    merged = {}
    for folder in (SHIPPED, user):
        path = folder / f"{chip}.json"
        if path.exists():
            merged.update(read_table(path, chip))
    return merged


def read_table(path: Path, chip: str) -> dict[str, tuple[Measurement, ...]]:
    """
    The measurements of one file, by decision.

    Raises:
        KernelTableError: the file is not JSON, of another format or chip, or holds an entry that is not a measurement.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise KernelTableError(path, str(error)) from error
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        got = table.get("format") if isinstance(table, dict) else type(table).__name__
        raise KernelTableError(path, f"format must be {FORMAT}, got {got!r}")
    if table.get("chip") != chip:
        raise KernelTableError(path, f"chip must be {chip!r}, got {table.get('chip')!r}")
    decisions = table.get("decisions")
    if not isinstance(decisions, dict) or not all(isinstance(entries, list) for entries in decisions.values()):
        raise KernelTableError(path, "decisions must be an object of lists")
    return {name: tuple(_measurement(path, name, e) for e in entries) for name, entries in decisions.items()}


def _measurement(path: Path, decision: str, entry: object) -> Measurement:
    fields = ("dtype", "sizes", "triton_us", "library_us", "configuration")
    if not isinstance(entry, dict) or entry.keys() != set(fields):
        raise KernelTableError(path, f"an entry of {decision!r} must have the fields {fields}, got {entry!r}")
    if not isinstance(entry["dtype"], str):
        raise KernelTableError(path, f"dtype in {decision!r} must be a string, got {entry['dtype']!r}")
    for name in ("sizes", "configuration"):
        numbers = entry[name]
        if not isinstance(numbers, dict) or not all(type(n) is int and 0 < n < 2**31 for n in numbers.values()):
            raise KernelTableError(path, f"{name} in {decision!r} must hold integers >= 1, got {numbers!r}")
    for name in ("triton_us", "library_us"):
        time = entry[name]
        if type(time) not in (int, float) or not 0 < time < math.inf:
            raise KernelTableError(path, f"{name} in {decision!r} must be a number > 0, got {time!r}")
    return Measurement(**entry, source=path)
