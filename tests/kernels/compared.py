"""An op's values and gradients on one path, and how far they are from those of another; for tests and their scripts."""

import contextlib
import itertools
import json

import torch
from torch.profiler import profile

# float64: against itself. float32: sums of up to 1023 terms in another order. Half precision, in steps of eps of the
# largest entry: half of one for each dequantised weight, for what lies between two GEMMs and for the result; sums of up
# to 192 such products with either sign lose two more where they cancel.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4 * 2**-10, torch.bfloat16: 4 * 2**-7}


def fresh(arguments, dtype=None):
    """The arguments as new leaves of the same strides, floating point ones in `dtype` if given."""

    def renew(value):
        if isinstance(value, torch.dtype):
            return dtype or value
        if not isinstance(value, torch.Tensor):
            return value
        # clone() and to() both keep the strides of dense tensors only, so the odd ones are copied with their storage
        copy = value.detach().new_empty(0).set_(value.detach().untyped_storage().clone(), *_geometry(value))
        if dtype is not None and value.is_floating_point():
            copy = copy.to(dtype)
        return copy.requires_grad_(value.requires_grad)

    return {name: renew(value) for name, value in arguments.items()}


def _geometry(tensor):
    return tensor.storage_offset(), tensor.shape, tensor.stride()


def results(function, arguments, dtype=None):
    """Outputs, then the gradients of all that requires one, for an upstream gradient that depends on shapes alone."""
    arguments = fresh(arguments, dtype)
    leaves = [value for value in arguments.values() if isinstance(value, torch.Tensor) and value.requires_grad]
    with contextlib.nullcontext() if leaves else torch.no_grad():
        outputs = function(**arguments)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    if not leaves:
        return outputs
    differentiable = [output for output in outputs if output.requires_grad]
    upstream = [
        torch.randn(output.shape, generator=torch.Generator().manual_seed(i)).to(output)
        for i, output in enumerate(differentiable)
    ]
    grads = torch.autograd.grad(differentiable, leaves, upstream)
    return [output.detach() for output in outputs] + list(grads)


def distance(ours, twin):
    """Largest difference over the twin's largest entry (at least 0.1); infinite where one of them is no number."""
    if ours.shape != twin.shape:
        return float("inf")
    difference = (ours.double() - twin.double()).abs()
    if not bool(difference.isfinite().all()):
        return float("inf")
    return (difference.max() / twin.double().abs().max().clamp(min=0.1)).item() if difference.numel() else 0.0


def worst_distance(ours, twin):
    return max(distance(a, b) for a, b in zip(ours, twin, strict=True))


def allocations(call, tmp_path):
    """Bytes of every allocation `call` makes, also inside operators."""
    return [size for size in _memory_events(call, tmp_path) if size > 0]


def peak(call, tmp_path):
    """Most bytes that `call` holds at once."""
    return max(itertools.accumulate(_memory_events(call, tmp_path)))


def _memory_events(call, tmp_path):
    """Bytes taken, and given back as negative numbers, in order."""
    with profile(profile_memory=True) as recorded:
        call()
    recorded.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    return [e["args"]["Bytes"] for e in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])]


def poison(patch):
    """Make fresh memory hold NaN (or -128, which no quantised value is): a result nobody wrote to then shows.

    Args:
        patch: called as `setattr(owner, name, value)`.
    """

    def fill(make):
        def poisoned(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor.fill_(-128) if tensor.dtype == torch.int8 else tensor

        return poisoned

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        patch(owner, name, fill(getattr(owner, name)))
