"""What every op asks before it runs: the one rule that chooses between Triton and torch, and autocast's dtype."""

import contextlib
import functools
import importlib
import logging
import os
from collections.abc import Iterator

import torch

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "triton", "torch")

# A plain global and not a context variable: CUDA backwards run on autograd's own threads and must see the same choice.
_forced = "auto"


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """
    Force every op onto one implementation inside a `with` block, for tests, debugging and benchmarks.

    The choice is process-wide. It is read when an op runs (a compiled graph follows it too), so a backward that runs
    outside the block follows the rule that holds there.

    Args:
        backend (`str`): `"auto"` (CUDA tensor and Triton importable -> Triton, else torch), `"torch"`, or `"triton"`,
            which refuses CPU tensors unless Triton was imported with `TRITON_INTERPRET=1`.

    Raises:
        ValueError: for any other `backend`.
    """
    global _forced
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    previous, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = previous


def runs_triton(op: str, tensor: torch.Tensor) -> bool:
    """
    Whether `op` shall run its Triton kernel for `tensor`.

    Args:
        op (`str`): the op's name, for messages.
        tensor (`torch.Tensor`): the op's main input. float64 always takes the torch path: the kernels compute in
            float32.

    Raises:
        RuntimeError: under `use_backend("triton")` where Triton cannot run: not installed, or a CPU tensor without the
            interpreter.
    """
    if _forced == "torch" or tensor.dtype == torch.float64:
        return False
    if _forced == "triton":
        if not _triton_importable():
            raise RuntimeError(f"{op}: use_backend('triton') needs the package triton, which cannot be imported")
        if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError(
                f"{op}: use_backend('triton') needs CUDA tensors, got device {tensor.device}; on CPU set "
                "TRITON_INTERPRET=1 before Triton is imported"
            )
        return True
    if not tensor.is_cuda:
        return False
    if not _triton_importable():
        _say_fallback_once()
        return False
    return True


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype autocast prescribes for a GEMM on this kind of device, `None` where it is off or unknown (meta)."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


@functools.cache
def _triton_importable() -> bool:
    try:
        importlib.import_module("triton")
    except ImportError:
        return False
    return True


@functools.cache
def _say_fallback_once() -> None:
    logger.warning("triton cannot be imported: the ops of hf_qst_kernels run their slower torch references on CUDA")
