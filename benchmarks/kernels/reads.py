"""The time of reading a hidden state once, and of the taps on it: rows of their own in the GPU's table.

A tap runs while the base's hidden state is there, so the least it can take is one reading. Pooling over windows of
channels is torch's alone (`tap pooling`), as a reduction and by its pooling kernels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks.kernels.registry import ModelShape, Workload
from hf_qst_kernels import tap_linear, use_backend

WINDOW = 16
RANK = 16
# What the pooling taps run on a GPU.
POOL = "F.max_pool1d, F.avg_pool1d"


@dataclass(frozen=True)
class Reading:
    """Rows that are measured like an op's and are none: a name, workloads, and the ways to compute each.

    Args:
        ways: `device type -> {variant: function of a workload's arguments}`, `"library"` among them.
    """

    name: str
    workloads: Callable[[ModelShape, int, torch.dtype, str], Iterator[Workload]]
    ways: Callable[[str], dict[str, Callable]]
    rows: tuple[int, ...] = (2048, 8192)
    trains: bool = False


def _state(model: ModelShape, rows: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.randn(rows, model.dim, device=device).to(dtype)


def _reads(model, rows, dtype, device):
    x = _state(model, rows, dtype, device)
    for name in ("sum of each row", "largest of each row"):
        moved = x.element_size() * (x.numel() + rows)
        yield Workload(name, {"x": x, "largest": name.startswith("largest")}, moved, 0, {})


def _read(x, largest):
    return x.amax(-1) if largest else x.sum(-1)


def _pools(model, rows, dtype, device):
    x = _state(model, rows, dtype, device)
    for name in ("maxpool", "avgpool"):
        moved = x.element_size() * (x.numel() + x.numel() // WINDOW)
        yield Workload(name, {"x": x, "largest": name == "maxpool"}, moved, 0, {})


def _reduced(x, largest):
    windows = x.unflatten(-1, (-1, WINDOW))
    return windows.amax(-1) if largest else windows.mean(-1)


def _pooled(x, largest):
    return (F.max_pool1d if largest else F.avg_pool1d)(x[None], WINDOW)[0]


def _taps(model, rows, dtype, device):
    x = _state(model, rows, dtype, device)
    for width in (RANK, model.dim // 16):
        weight = (torch.randn(width, model.dim, device=device) / model.dim**0.5).to(dtype).requires_grad_()
        for storage in ("full", "int8"):
            # what int8 keeps is written as well: a byte an entry and a scale a block
            kept = x.numel() + x.numel() // 16 if storage == "int8" else 0
            moved = x.element_size() * (x.numel() + weight.numel() + rows * width) + kept
            arguments = {"x": x, "weight": weight, "storage": storage}
            yield Workload(f"to {width}, {storage}", arguments, moved, 2 * rows * weight.numel(), {})


def _tap_ways(device: str) -> dict[str, Callable]:
    def on(backend):
        def forward(**arguments):
            # a gradient is recorded, for else nothing would be kept
            with torch.enable_grad(), use_backend(backend):
                return tap_linear(**arguments)

        return forward

    ours = {"triton": on("triton"), "auto": on("auto")} if device == "cuda" else {}
    return {**ours, "library": on("torch"), "F.linear": lambda x, weight, storage: F.linear(x, weight)}


READINGS = (
    Reading("read once", _reads, lambda device: {"library": _read}),
    Reading("tap pooling", _pools, lambda device: {"library": _reduced, POOL: _pooled}),
    Reading("tap forward", _taps, _tap_ways),
)
