"""The peers of each op besides its own library path: plain torch, also under `torch.compile`, and other packages."""

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from benchmarks.kernels.registry import Op
from hf_qst_kernels.nf4_weight import naive_weight


def _dense(weight, dtype):
    """A head's weight; one in 4 bits dequantised as a whole."""
    return weight if isinstance(weight, torch.Tensor) else naive_weight(weight, torch.float32).to(dtype)


def _cross_entropy(hidden, weight, labels, bias=None, logit_softcap=None, logit_scale=1.0, chunk_size=None, **options):
    logits = F.linear(hidden, _dense(weight, hidden.dtype), bias).float()
    if logit_scale != 1.0:
        logits = logit_scale * logits
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    return F.cross_entropy(logits, labels, **options)


def _tap(x, weight, storage="int8", center=None):
    return F.linear(x if center is None else (x - center).to(x.dtype), weight)


def _linear_index_add(x, weight, bias, index, residual, inplace):
    return residual.index_add_(-1, index, F.linear(x, weight, bias))


# The op as a user would write it, its GEMMs in the inputs' dtype; an op that is not here is its naive twin.
PLAIN = {"linear_cross_entropy": _cross_entropy, "tap_linear": _tap, "linear_index_add": _linear_index_add}


class MissingPeerError(RuntimeError):
    """A peer that is not installed here, or does not have what a workload asks for; its row has these facts."""

    def __init__(self, reason: str, lacking: bool = False):
        super().__init__(reason)
        self.facts = {"failed": reason, "lacking": lacking}


def liger_cross_entropy(
    hidden, weight, labels, bias=None, ignore_index=-100, label_smoothing=0.0, logit_softcap=None, reduction="mean",
    logit_scale=1.0
):  # fmt: skip
    """Liger-Kernel's fused linear cross entropy, by the names of `linear_cross_entropy`; its own rule for chunks.

    Raises:
        MissingPeerError: it is not installed, or has no such option.
    """
    if find_spec("liger_kernel") is None:
        raise MissingPeerError("liger_kernel is not installed", lacking=True)
    if logit_scale != 1.0 or not isinstance(weight, torch.Tensor):
        raise MissingPeerError("Liger has no factor on the logits and no 4-bit head")
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    # by position, as a torch.autograd.Function takes them: weights of classes, ignored label, z-loss, smoothing,
    # reduction, cap on the logits
    result = LigerFusedLinearCrossEntropyFunction.apply(
        hidden, weight, labels, bias, None, ignore_index, 0.0, label_smoothing, reduction, logit_softcap
    )
    return result[0] if isinstance(result, tuple) else result


def peers(op: Op, compiled: bool, device_type: str = "cpu") -> dict[str, Callable]:
    """Name -> function of the op's arguments, of those that run on this kind of device.

    Args:
        compiled: with those that take `torch.compile` its seconds a shape.
    """
    plain = PLAIN.get(op.name, op.naive)
    functions = {}
    if op.name == "linear_index_add":
        functions["F.linear + index_add_"] = plain
    if op.name == "linear_cross_entropy":
        functions["F.linear + F.cross_entropy"] = plain
        if device_type == "cuda":
            functions["Liger"] = liger_cross_entropy
    if compiled:
        # after eight shapes of one function torch.compile would run it uncompiled and say nothing
        torch._dynamo.reset()
        functions["torch.compile"] = torch.compile(plain, dynamic=False)
    return functions
