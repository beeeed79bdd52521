"""The one rule that chooses an op's implementation, and autocast's dtype."""

import contextlib
import functools
import importlib
import logging
import os
from collections.abc import Iterator, Mapping

import torch
from torch.autograd import forward_ad

from . import break_even

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "triton", "torch", "naive")
VARIABLE = "HF_QST_KERNELS"
# The sizes of an op whose kernel wins everywhere.
NO_TABLE: Mapping[str, int] = {}


def _from_environment() -> str:
    backend = os.environ.get(VARIABLE, "auto")
    if backend not in BACKENDS:
        raise ValueError(f"the environment variable {VARIABLE} must be one of {BACKENDS}, got {backend!r}")
    return backend


# Plain globals and not context variables: CUDA backwards run on autograd's own threads and must see the same choice.
_forced = _from_environment()
_forced_configurations: dict[str, Mapping[str, int] | None] = {}


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """
    Force every op onto one implementation inside a `with` block, for tests, debugging and benchmarks.

    The choice is process-wide and read when an op runs, also in a compiled graph (which has traced `"naive"`); a backward
    outside the block follows the rule there. The environment variable `HF_QST_KERNELS`, read once at import, sets what
    holds outside all blocks.

    Args:
        backend (`str`): `"auto"` (the rule of `runs_triton`), `"torch"` (the library path), `"triton"`, which refuses
            CPU tensors unless Triton was imported with `TRITON_INTERPRET=1`, or `"naive"`: the op's equation in plain
            torch, with torch's own autograd and in no memory-saving way.

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


@contextlib.contextmanager
def use_configuration(decision: str, configuration: Mapping[str, int] | None) -> Iterator[None]:
    """Launch one kernel in this configuration inside a `with` block, or with `None` not at all; for tuning."""
    previous = dict(_forced_configurations)
    _forced_configurations[decision] = configuration
    try:
        yield
    finally:
        _forced_configurations.clear()
        _forced_configurations.update(previous)


def runs_naive() -> bool:
    """Whether ops shall evaluate their equation in plain torch."""
    return _forced == "naive"


def runs_triton(op: str, tensor: torch.Tensor, sizes: Mapping[str, int] | None = NO_TABLE) -> bool:
    """
    Whether `op` shall run its Triton kernel for `tensor`.

    By default it does on a CUDA device if Triton imports and, with `sizes`, if a table for this chip says that the kernel
    was faster than the library. Never where each operation of torch has to be seen: while `torch.compile` or a trace is
    made, under `torch.func`'s transforms and forward-mode differentiation. (A compiled graph holds an op as one operator,
    inside which this is asked when the graph runs.)

    Args:
        op (`str`): the op's name, or that with `_backward`; for messages and as the table's key.
        tensor (`torch.Tensor`): the op's main input. float64 always takes the torch path: the kernels compute in
            float32.
        sizes (`Mapping[str, int]`, *optional*): of this call, by `hf_qst_kernels.decisions`; `None` where no kernel can
            compute it. Without the argument no table is asked.

    Raises:
        RuntimeError: under `use_backend("triton")` where Triton cannot run: not installed, or a CPU tensor without the
            interpreter.
        KernelTableError: a table for this chip is there and broken.
    """
    if torch.compiler.is_compiling():  # first of all, so that nothing below is compiled
        return False
    if (
        sizes is None
        or _forced in ("torch", "naive")
        or tensor.dtype == torch.float64
        or _forced_configurations.get(op, True) is None
    ):
        return False
    if every_operation_counts():
        return False
    if _forced == "triton":
        if not _triton_importable():
            raise RuntimeError(f"{op}: use_backend('triton') needs the package triton, which cannot be imported")
        if not tensor.is_cuda and not interpreted():
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
    if sizes is NO_TABLE:
        return True
    measured = break_even.nearest(op, tensor, sizes)
    if measured is None:
        _say_once_if_unmeasured(tensor.device)
    return measured is not None and measured.wins


def configuration(
    decision: str, tensor: torch.Tensor, sizes: Mapping[str, int], default: Mapping[str, int]
) -> Mapping[str, int]:
    """
    How to launch a kernel: as `use_configuration` says, as measured near these sizes on this chip, or as by default.

    Raises:
        KernelTableError: the measured configuration is not one of this kernel.
    """
    if decision in _forced_configurations:
        return _forced_configurations[decision]
    measured = break_even.nearest(decision, tensor, sizes)
    if measured is None:
        return default
    if measured.configuration.keys() != default.keys():
        raise break_even.KernelTableError(
            measured.source,
            f"a configuration of {decision!r} must have the fields {tuple(default)}, got {dict(measured.configuration)}",
        )
    return measured.configuration


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype autocast prescribes for a GEMM on this kind of device, `None` where it is off or unknown (meta)."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def every_operation_counts() -> bool:
    """Whether something stands between torch's operations and their results, which a kernel would pass by in silence.

    `vmap` and `grad` hand over tensors without memory, forward mode loses its tangents and a trace what was computed.
    """
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_tracing()
    )


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


@functools.cache
def _say_once_if_unmeasured(device: torch.device) -> None:
    if not break_even.has_table(device):
        logger.info(
            "no kernel measurements for %s: ops that need them run their library path. "
            "`python -m benchmarks.kernels --device cuda --tune` makes them",
            torch.cuda.get_device_name(device),
        )
