"""Entropy and other measures of certainty of a row of scores."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

LARGEST_GAP = 200.0
"""A score this far below the largest has probability 0 in float32."""
BLOCK = 256
"""Scores per block of `_two_largest`."""
IN_CACHE = 1 << 19
"""Scores processed at a time on the CPU: few enough for its cache, enough for all of its threads."""
SAMPLE = 2048
"""`entropy` first assumes that the largest of this many scores is near the largest of all."""
LOG2_E = math.log2(math.e)


class Certainty(NamedTuple):
    """Certainty of the model about the next token at temperature 1; float32 `[batch]` each."""

    entropy: torch.Tensor
    """In nats."""
    top_probability: torch.Tensor
    top_two_gap: torch.Tensor
    """Difference of the two largest scores, at most `LARGEST_GAP`."""


def runs_on_host(tensor: torch.Tensor) -> bool:
    """Whether values can be read as Python numbers at no cost: on the CPU, outside of `torch.compile`."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def certainty(scores: torch.Tensor) -> Certainty:
    """Entropy, largest probability and gap of each row of `scores` `[batch, vocabulary]`.

    Computed in float32 from any floating dtype. A score of -inf has probability 0.
    """
    largest, second = _two_largest(scores).unbind(-1)
    nats, mass = _entropy_and_mass(scores, largest)
    return Certainty(nats, mass.reciprocal(), (largest - second).clamp(max=LARGEST_GAP))


def entropy(scores: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
    """Entropy in nats of the softmax of each row, float32 `[batch]` from `[batch, vocabulary]`.

    Args:
        scores: any floating dtype; a score of -inf has probability 0.
        rows (*optional*): indices `[n]`; only these rows are computed, and the result is `[n]`.
    """
    if not runs_on_host(scores):
        selected = scores if rows is None else scores[rows]
        return _entropy_and_mass(selected, selected.amax(-1))[0]
    nats = _entropy_and_mass(scores, scores[:, :SAMPLE].amax(-1), rows)[0]
    overflowed = (~nats.isfinite()).nonzero()[:, 0]
    if len(overflowed):
        again = overflowed if rows is None else rows[overflowed]
        nats[overflowed] = _entropy_and_mass(scores, scores.amax(-1), again)[0]
    return nats


def _entropy_and_mass(
    scores: torch.Tensor, reference: torch.Tensor, rows: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(entropy, sum of e^(score - reference)), float32 `[batch]` each; `reference` `[batch]` is near the largest scores."""
    reference = reference.float().unsqueeze(-1)
    if not runs_on_host(scores):
        return _of_block(scores, reference)
    size = max(1, IN_CACHE // scores.shape[-1])
    if rows is None:
        blocks = zip(scores.split(size), reference.split(size), strict=True)
    else:
        blocks = ((scores[part], reference[part]) for part in rows.split(size))
    return tuple(map(torch.cat, zip(*(_of_block(*block) for block in blocks), strict=True)))


def _of_block(scores: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """H = ln Z - sum(p s), with scores in bits because powers of 2 are several times cheaper than powers of e."""
    bits = torch.add(reference * -LOG2_E, scores.float(), alpha=LOG2_E)
    weights = bits.exp2()
    mass = weights.sum(-1)
    # 0 * -inf is NaN, which nansum skips.
    mean = weights.mul_(bits).nansum(-1) / mass
    return ((mass.log2() - mean) / LOG2_E).clamp(min=0), mass


def _two_largest(scores: torch.Tensor) -> torch.Tensor:
    """The two largest scores of each row, float32 `[batch, 2]` from `[batch, vocabulary]`.

    They lie in the two blocks with the largest maxima or after the last whole block. Finding those blocks is much
    cheaper than a top-k over the row.
    """
    whole = scores.shape[-1] - scores.shape[-1] % BLOCK
    if whole > 2 * BLOCK:
        blocks = scores[:, :whole].unflatten(1, (-1, BLOCK))
        best = blocks.amax(-1).topk(2, dim=-1).indices
        candidates = blocks.gather(1, best.unsqueeze(-1).expand(-1, -1, BLOCK)).flatten(1)
        scores = torch.cat([candidates, scores[:, whole:]], dim=-1)
    return scores.topk(2, dim=-1).values.float()
