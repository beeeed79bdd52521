"""What the processes of a training exchange in a step, from the parameters of a model and the blocks with gradients."""

from __future__ import annotations

import torch
from torch import nn

from hf_qst.base_model.block_calls import hidden_of
from hf_qst.base_model.decoder_stack import UnsupportedArchitectureError, find_decoder_stack
from hf_qst.planning.model_parts import with_head


class Exchange:
    """Bytes of a step that depend on how the model is divided; made before a model runs, and asked after it did.

    Args:
        model: whose forward passes are watched.
        autocast (`torch.dtype`, *optional*): what FSDP sends in the place of float32.
    """

    def __init__(self, model: nn.Module, autocast: torch.dtype | None = None):
        self.model, self.autocast = model, autocast
        self._on_the_way_back: set[nn.Module] = set()
        self._released: list[nn.Module] = []
        try:
            blocks = find_decoder_stack(with_head(model)).blocks
        except UnsupportedArchitectureError:
            return
        for block in blocks:
            block.register_forward_hook(self._watch)
        self._released = [*_untied_embedding(with_head(model)), *blocks]

    def _watch(self, block: nn.Module, args, output) -> None:
        if hidden_of(output).requires_grad:
            self._on_the_way_back.add(block)

    def _size(self, parameter: torch.Tensor) -> int:
        sent = self.autocast if self.autocast is not None and parameter.is_floating_point() else parameter.dtype
        return parameter.numel() * sent.itemsize

    def bytes(self) -> dict[str, int]:
        """`"gradients"` of all that is trained, as DDP sums them; `"gathered"` and `"reduced"`, what FSDP2 gathers of the
        weights and sums of the gradients. Empty where the blocks are not known.

        accelerate lets FSDP2 release the embedding and the blocks after their forward passes. They are gathered again where
        a gradient goes back through them, and so is the one before these, which FSDP2 fetches before it knows.
        """
        if not self._released:
            return {}
        trained = [p for p in self.model.parameters() if p.requires_grad]
        first = next((i for i, part in enumerate(self._released) if part in self._on_the_way_back), len(self._released))
        again = {id(p): p for part in self._released[max(0, first - 1) :] for p in part.parameters()}
        return {
            "gradients": sum(p.numel() * p.element_size() for p in trained),
            "gathered": sum(map(self._size, (*self.model.parameters(), *again.values()))),
            "reduced": sum(map(self._size, trained)),
        }


def _untied_embedding(model: nn.Module) -> list[nn.Module]:
    """The input embedding, unless it shares its weight with the head, which is kept until the backward pass."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return [] if head is not None and head.weight is embedding.weight else [embedding]


def received(exchanged: dict[str, int], processes: int) -> dict[str, int]:
    """Bytes that each process receives in a step, by how the model is divided: `"ddp"`, `"zero2"`, `"fsdp2"`.

    A sum over n processes in which each gets its part, and a tensor gathered from n parts, bring (n - 1) / n of their size
    to each process, whatever the algorithm; a sum that all get brings twice that.
    """
    part = (processes - 1) / processes
    both = round(2 * part * exchanged["gradients"])
    return {"ddp": both, "zero2": both, "fsdp2": round(part * (exchanged["gathered"] + exchanged["reduced"]))}
