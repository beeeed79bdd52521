"""Runs a whole side-tuned model through the Triton kernels on the CPU and prints how far its loss and gradients are from
those of torch, and how often the kernel before a side block ran; a test starts it.

A process of its own, because `TRITON_INTERPRET` is read when Triton is imported.
"""

import contextlib
import json

import torch

from hf_qst_kernels import use_backend
from hf_qst_kernels.dispatch import use_configuration
from tests.architectures import side_network, side_tuned, tiny, token_batch

LAYERS = 2
CASES = {
    "linear": {"downsample": "linear"},
    "linear, checkpointing": {"downsample": "linear", "side_checkpointing": True},
    "linear, vector gates, checkpointing": {"downsample": "linear", "gate_shape": "vector", "side_checkpointing": True},
    "adapter, no norm": {"downsample": "adapter", "downsample_layernorm": False, "side_checkpointing": False},
    "maxpool": {"downsample": "maxpool"},
    "maxpool, vector gates, nothing recomputed": {
        "downsample": "maxpool",
        "gate_shape": "vector",
        "side_checkpointing": False,
    },
    "principal": {"downsample": "principal"},
    "principal, vector gates, checkpointing": {
        "downsample": "principal",
        "gate_shape": "vector",
        "side_checkpointing": True,
    },
    "linear, bfloat16 autocast": {"downsample": "linear"},
    "dropout": {"downsample": "linear", "downsample_dropout": 0.3},
}


class Counted:
    """Calls of a launcher."""

    def __init__(self, name):
        from hf_qst_kernels.ops import norm_gate_triton

        self.calls, self.real = 0, getattr(norm_gate_triton, name)
        setattr(norm_gate_triton, name, self)

    def __call__(self, *args):
        self.calls += 1
        return self.real(*args)


def loss_and_gradients(model, backend, autocast=False, backward_inside=True):
    ids = token_batch(2, 6).to(next(model.parameters()).device)
    torch.manual_seed(1)
    with contextlib.ExitStack() as stack:
        stack.enter_context(use_backend(backend))
        if autocast:
            stack.enter_context(torch.autocast(ids.device.type, dtype=torch.bfloat16))
            stack.enter_context(
                use_configuration("tap_linear", None)
            )  # the interpreter's own bfloat16 rounds otherwise
        loss = model(input_ids=ids, labels=ids).loss
        if not backward_inside:
            stack.close()
        parameters = [p for p in side_network(model).parameters() if p.requires_grad]
        return loss.detach(), torch.autograd.grad(loss, parameters)


def difference(ours, theirs):
    """Of the losses, and of each parameter's gradient over its largest entry."""
    loss = (ours[0] - theirs[0]).abs().item()
    gradients = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours[1], theirs[1], strict=True)]
    return [loss, max(gradients)]


def model_of(settings):
    torch.manual_seed(0)
    model = side_tuned(model=tiny("llama", num_hidden_layers=LAYERS), awake=True, **settings).train()
    for gate in side_network(model).gates:
        torch.nn.init.normal_(gate.value)
    for part in side_network(model).downsample:
        if part.norm is not None:
            torch.nn.init.normal_(part.norm.weight)
            torch.nn.init.normal_(part.norm.bias)
            part.norm.eps = 0.1  # not what the kernel takes by default
    return model


if __name__ == "__main__":
    torch.set_num_threads(1)
    counted = [Counted("mix_rows"), Counted("mix_rows_backward")]
    found = {}
    for name, settings in CASES.items():
        model, autocast = model_of(settings), "autocast" in name
        theirs = loss_and_gradients(model, "torch", autocast)
        before = [count.calls for count in counted]
        ours = loss_and_gradients(model, "triton", autocast)
        found[name] = {
            "difference": difference(ours, theirs),
            "calls": [count.calls - start for count, start in zip(counted, before, strict=True)],
        }
    model = model_of(CASES["linear, checkpointing"])
    ours = loss_and_gradients(model, "triton", backward_inside=False)
    found["backward by another rule"] = {"difference": difference(ours, loss_and_gradients(model, "torch"))}
    with torch.no_grad(), use_backend("triton"):
        before = counted[0].calls
        logits = model(input_ids=token_batch(2, 6)).logits
        found["evaluation"] = {"calls": [counted[0].calls - before, 0]}
    with torch.no_grad():
        found["evaluation"]["difference"] = [(logits - model(input_ids=token_batch(2, 6)).logits).abs().max().item(), 0]
    print(json.dumps(found))
