"""Loss terms of a method's own, added from inside the model.

A term added to a model's `loss` is lost under trainers that compute their own from the logits (TRL's SFTTrainer), and a
callback never sees a loss. A gradient added on the way back is the same under all of them.
"""

from __future__ import annotations

import torch


class _AddedLoss(torch.autograd.Function):
    """Identity on `hidden`; hands `scale` to `loss` as its gradient."""

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, loss: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale, ctx.like = scale, loss.detach()
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient, torch.full_like(ctx.like, ctx.scale), None


def with_auxiliary_loss(hidden: torch.Tensor, loss: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """`hidden` unchanged; whoever back-propagates through it back-propagates `scale * loss` as well.

    The term does not pass through the trainer's own scaling. Under gradient accumulation over n batches `scale` must be
    1/n for the mean of the term over them; a gradient scaler (float16) would not know of it.

    Args:
        hidden (`torch.Tensor`): any shape, on the way from the parameters to the loss.
        loss (`torch.Tensor`): a scalar with a graph of its own.
        scale (`float`): its weight.
    """
    return _AddedLoss.apply(hidden, loss, scale)
