"""Binary gates with gradients for their logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sample:
    """Gates of one forward [channels]: what activations are multiplied by, and what the budget counts."""

    gates: torch.Tensor
    counted: torch.Tensor


class _Bernoulli(torch.autograd.Function):
    """Draws B ~ Bernoulli(sigmoid(z)); `slope(p0, p1)` is ds/dz, where p0 = sigmoid(z), p1 = (B + sigmoid(z/tau)) / 2."""

    @staticmethod
    def forward(ctx, logits: torch.Tensor, temperature: float, slope: Callable) -> torch.Tensor:
        kept = torch.sigmoid(logits)
        drawn = torch.bernoulli(kept)
        ctx.save_for_backward(kept, (drawn + torch.sigmoid(logits / temperature)) / 2)
        ctx.slope = slope
        return drawn

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient * ctx.slope(*ctx.saved_tensors), None, None


def _reinmax(p0: torch.Tensor, p1: torch.Tensor) -> torch.Tensor:
    return 2 * p1 * (1 - p1) - p0 * (1 - p0) / 2


def _reinmax_as_printed(p0: torch.Tensor, p1: torch.Tensor) -> torch.Tensor:
    # sigmoid'(ln p1), where the two-class form of the method has sigmoid'(logit p1) = p1 (1 - p1).
    return 2 * p1 / (1 + p1).square() - p0 * (1 - p0) / 2


def _straight_through(p0: torch.Tensor, p1: torch.Tensor) -> torch.Tensor:
    return p0 * (1 - p0)


def _bernoulli(slope: Callable) -> Callable:
    def sample(logits: torch.Tensor, temperature: float, gumbel_temperature: float) -> Sample:
        gates = _Bernoulli.apply(logits, temperature, slope)
        return Sample(gates, gates)

    return sample


def _gumbel(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    noise = -torch.log(-torch.log(torch.rand_like(logits).clamp(min=1e-20)))
    return torch.sigmoid((logits + noise) / temperature)


def _gumbel_sigmoid(logits: torch.Tensor, temperature: float, gumbel_temperature: float) -> Sample:
    soft = _gumbel(logits, gumbel_temperature)
    counted = _gumbel(logits, gumbel_temperature)
    return Sample(soft, counted + (counted.round() - counted).detach())


ESTIMATORS: dict[str, Callable[[torch.Tensor, float, float], Sample]] = {
    "reinmax": _bernoulli(_reinmax),
    "reinmax_as_printed": _bernoulli(_reinmax_as_printed),
    "straight_through": _bernoulli(_straight_through),
    "gumbel_sigmoid": _gumbel_sigmoid,
}
"""By name, functions of (logits [channels] with the initial bias added, temperature, gumbel_temperature).

- `"reinmax"`: Liu et al., "Bridging Discrete and Backpropagation" (2023), for two classes:
  ds/dz = 2 p1 (1 - p1) - p0 (1 - p0) / 2. Unbiased for losses that are quadratic in the gate.
- `"reinmax_as_printed"`: algorithm 2 of the DISP-LLM paper to the letter, with ln p1 in place of logit p1.
- `"straight_through"`: ds/dz = p0 (1 - p0).
- `"gumbel_sigmoid"`: what the authors' released code does: soft gates, and a second draw, rounded, for the budget.
"""

THRESHOLDS = {name: math.log(math.log(2)) if name == "gumbel_sigmoid" else 0.0 for name in ESTIMATORS}
"""The logit at which a channel is kept with probability 1/2."""
