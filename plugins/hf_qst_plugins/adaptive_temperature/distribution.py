"""What a row of scores says about how sure the model is."""

from __future__ import annotations

from typing import NamedTuple

import torch

LOWEST = -200.0
"""A score this far below the largest has probability 0 in float32."""
BLOCK = 256
"""Scores in a block, of which `top_two_gap` takes the largest first."""


class Certainty(NamedTuple):
    """How sure the model is of the next token, at temperature 1; float32 `[batch]` each."""

    entropy: torch.Tensor
    """In nats."""
    top_probability: torch.Tensor


def certainty(scores: torch.Tensor) -> Certainty:
    """Entropy and largest probability of the softmax of each row of `scores` `[batch, vocabulary]`.

    Any float type, computed in float32; -inf counts as ruled out.
    """
    scores = scores.float()
    if scores.device.type == "cpu" and not torch.compiler.is_compiling() and scores.shape[0] > 1:
        # Row by row the probabilities stay in the processor's cache.
        result = Certainty(*(torch.cat(parts) for parts in zip(*map(_certainty, scores.split(1)), strict=True)))
        if not result.entropy.isnan().any():
            return result
    # 0 * -inf is no number: scores that are ruled out become finite ones of probability 0.
    return _certainty(scores.maximum(scores.amax(-1, keepdim=True) + LOWEST))


def _certainty(scores: torch.Tensor) -> Certainty:
    """H = ln Z - sum(p s), where ln Z = s - ln p for any score s, the largest here."""
    probabilities = scores.softmax(-1)
    top = probabilities.amax(-1)
    mean = torch.linalg.vecdot(probabilities, scores)
    return Certainty((scores.amax(-1) - top.log() - mean).clamp(min=0), top)


def entropy(scores: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of the softmax of each row, float32 `[batch]` from `[batch, vocabulary]`; -inf is ruled out."""
    return certainty(scores).entropy


def top_two_gap(scores: torch.Tensor) -> torch.Tensor:
    """Difference of the two largest scores, float32 `[batch]` from `[batch, vocabulary]`, at most `-LOWEST`.

    The two largest lie in the two blocks with the largest maxima, or behind the last whole block; finding those is much
    cheaper than a top-k over the row.
    """
    whole = scores.shape[-1] - scores.shape[-1] % BLOCK
    if whole > 2 * BLOCK:
        blocks = scores[:, :whole].unflatten(1, (-1, BLOCK))
        best = blocks.amax(-1).topk(2, dim=-1).indices
        found = blocks.gather(1, best.unsqueeze(-1).expand(-1, -1, BLOCK)).flatten(1)
        scores = torch.cat([found, scores[:, whole:]], dim=-1)
    top = scores.topk(2, dim=-1).values.float()
    return (top[:, 0] - top[:, 1]).clamp(max=-LOWEST)
