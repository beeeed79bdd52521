"""What each op is measured against besides its own library path: plain torch under `torch.compile`, and other packages."""

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from hf_qst_kernels.registry import Op


def _cross_entropy(hidden, weight, labels):
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def _tap(x, weight):
    return F.linear(x, weight)


def _linear_index_add(x, weight, bias, index, residual, inplace):
    return residual.index_add_(-1, index, F.linear(x, weight, bias))


def _low_rank(x, down, up):
    return F.linear(F.linear(x, down), up)


def _nf4(x, packed, absmax, out_features, nested_absmax, nested_code, nested_offset):
    from hf_qst_kernels.nf4 import CODE

    code = torch.tensor(CODE, device=x.device)
    values = code[torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], -1).int()].view(-1, 64)
    scales = nested_code[absmax.int()] * nested_absmax.repeat_interleave(256)[: absmax.numel()] + nested_offset
    return F.linear(x, (values * scales[:, None]).to(x.dtype).view(out_features, -1))


# The op as a user would write it, its GEMMs in the inputs' dtype; an op that is not here is its naive twin.
PLAIN = {
    "linear_cross_entropy": _cross_entropy,
    "tap_linear": _tap,
    "linear_index_add": _linear_index_add,
    "low_rank_linear": _low_rank,
    "nf4_linear": _nf4,
}


def _liger_cross_entropy(hidden, weight, labels):
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    result = LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, labels)
    return result[0] if isinstance(result, tuple) else result


def peers(op: Op, compiled: bool) -> dict[str, Callable]:
    """Name -> function of the op's arguments; `compiled`: with those that take `torch.compile` its seconds a shape."""
    plain = PLAIN.get(op.name, op.naive)
    found = {}
    if op.name == "linear_index_add":
        found["F.linear + index_add_"] = plain
    if op.name == "linear_cross_entropy":
        found["F.linear + F.cross_entropy"] = plain
        if find_spec("liger_kernel"):
            found["Liger"] = _liger_cross_entropy
    if compiled:
        found["torch.compile"] = torch.compile(plain, dynamic=False)
    return found
