"""Small pruned models, the kernels that their blocks launch, and what a run of one shows; for tests and their script."""

import contextlib

import torch

from hf_qst.pruning import PrunedBranch, prune_blocks, use_kernels
from tests.architectures import tiny, token_batch
from tests.pruned_models import random_masks

FUSED = ("llama", "mistral", "qwen2", "qwen3")
IDS = token_batch(2, 4)
SMALL = {"hidden_size": 32, "intermediate_size": 48}


def pruned(name="llama", device="cpu", blocks=None, **changes):
    """A pruned model of 32 channels, of its first blocks only if so told; a Llama with biases everywhere."""
    biases = {"attention_bias": True, "mlp_bias": True} if name == "llama" else {}
    model = tiny(name, **{**SMALL, **biases, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms of one and biases of zero would hide a wrong channel
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model = use_kernels(prune_blocks(model, random_masks(model)).to(device))
    model.model.layers = model.model.layers[:blocks]
    return model


def sites(model) -> tuple[int, int]:
    """How many selections and additions of a model's blocks a kernel could run."""
    branches = [module for module in model.modules() if isinstance(module, PrunedBranch)]
    return sum(b.input_index is not None for b in branches), sum(b.output_index is not None for b in branches)


class Launches:
    """Counts the launches of the two kernels: `(selections, additions)` since the last look."""

    def __init__(self, patch=setattr):
        from hf_qst_kernels.ops import linear_index_add_triton, norm_index_select_triton

        self.numbers = [0, 0]
        for i, (module, name) in enumerate(
            ((norm_index_select_triton, "norm_select"), (linear_index_add_triton, "add_linear"))
        ):
            patch(module, name, self._counted(i, getattr(module, name)))

    def _counted(self, i, launch):
        def counted(*args, **kwargs):
            self.numbers[i] += 1
            return launch(*args, **kwargs)

        return counted

    def look(self) -> tuple[int, int]:
        seen, self.numbers = tuple(self.numbers), [0, 0]
        return seen


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids.to(model.device)).logits


@contextlib.contextmanager
def inputs_watched(blocks):
    """Yields a list that holds, after a run, for each block whether the input it was given has the values it had."""
    kept, unchanged = [], []
    handles = [
        block.register_forward_pre_hook(lambda _, args: kept.append((args[0], args[0].clone()))) for block in blocks
    ]
    try:
        yield unchanged
        unchanged += [torch.equal(now, then) for now, then in kept]
    finally:
        for handle in handles:
            handle.remove()


def furthest(ours, twin) -> float:
    """Largest difference between two tensors, or two lists of them."""
    ours, twin = ([t] if isinstance(t, torch.Tensor) else list(t) for t in (ours, twin))
    assert len(ours) == len(twin) > 0
    return max(
        (a.double() - b.double()).abs().nan_to_num(float("inf")).max().item() for a, b in zip(ours, twin, strict=True)
    )
