"""The paper's form of compensation: a second pair of factors, trained by gradient descent."""

from __future__ import annotations

import torch
from tqdm.auto import tqdm

from hf_qst.mixed_rank.decomposition.factors import factorize

GRADIENT_STEPS = 300
GRADIENT_LEARNING_RATE = 1e-3
# Rows of the proxy data set of the gradient form, its part that is held out, and rows of one step.
PROXY_ROWS = 4096
_HELD_OUT = 0.1
_STEP_ROWS = 512
# The gradient form looks at the held-out rows every so many steps and stops when that has not helped so many times.
_LOOK_EVERY = 10
_PATIENCE = 5
_SMALLEST_GAIN = 1e-4


class ProxyRows:
    """Up to `PROXY_ROWS` pairs of rows, the same number from each batch, evenly spaced."""

    def __init__(self, batches: int):
        self.quota = -(-PROXY_ROWS // batches)
        self.rows: list[torch.Tensor] = []
        self.others: list[torch.Tensor] = []

    def add_pair(self, rows: torch.Tensor, others: torch.Tensor) -> None:
        """rows, others: [n, d], inputs in the partly compressed and in the dense model."""
        stride = -(-len(rows) // self.quota)
        self.rows.append(rows[::stride].float())
        self.others.append(others[::stride].float())


def gradient_factors(
    weight: torch.Tensor,
    proxy: ProxyRows,
    rank: int,
    moment: torch.Tensor,
    residual_ratio: float = 0.1,
    steps: int = GRADIENT_STEPS,
    learning_rate: float = GRADIENT_LEARNING_RATE,
    seed: int = 0,
    progress: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The paper's form: a second low-rank pair G Y' next to U V', trained by gradient descent, folded into one.

    The ranks of the two pairs add up to `rank`. U V' is frozen; G starts at N(0, 1/d_in), Y at zero; Adam minimises
    ||z (U V' + G Y') - x W||^2 over a proxy data set. The step that was best on a held-out tenth is kept, and training
    stops when several looks at it brought nothing. Folding, [U G][V Y]', is exact.

    Args:
        weight: W [d_in, d_out].
        proxy: pairs of rows of inputs.
        rank (`int`): of the result.
        moment: second moment [d_in, d_in] of the inputs in the partly compressed model, for U V'.
        residual_ratio (`float`): part of the rank that G Y' gets; none when that rounds to zero or to all of it.
        steps (`int`), learning_rate (`float`), seed (`int`): of the descent.

    Returns:
        A [d_in, rank] and B [rank, d_out] in float64.
    """
    residual = round(residual_ratio * rank)
    if residual == 0 or residual == rank:
        return factorize(weight, rank, moment)
    left, right = factorize(weight, rank - residual, moment)
    device = weight.device
    rows, others = (torch.cat(part).to(device) for part in (proxy.rows, proxy.others))
    target = others @ weight.float()
    remainder = target - rows @ left.float() @ right.float()
    scale = target.square().sum(1).mean().clamp(min=torch.finfo(torch.float32).tiny)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows), generator=generator).to(device)
    held_out, training = order.tensor_split([max(1, int(_HELD_OUT * len(rows)))])
    start = torch.randn(weight.shape[0], residual, generator=generator) * weight.shape[0] ** -0.5
    second = start.to(device).requires_grad_()
    third = torch.zeros(residual, weight.shape[1], device=device, requires_grad=True)

    def loss(index: torch.Tensor) -> torch.Tensor:
        return (rows[index] @ second @ third - remainder[index]).square().sum(1).mean() / scale

    with torch.no_grad():
        best, best_pair, waited = loss(held_out).item(), (second.detach().clone(), third.detach().clone()), 0
    optimizer = torch.optim.Adam([second, third], lr=learning_rate)
    bar = tqdm(range(1, steps + 1), desc="compensation", unit="step", leave=False, disable=not progress)
    with torch.enable_grad():
        for step in bar:
            picked = torch.randint(len(training), (min(_STEP_ROWS, len(training)),), generator=generator).to(device)
            optimizer.zero_grad()
            loss(training[picked]).backward()
            optimizer.step()
            if step % _LOOK_EVERY:
                continue
            with torch.no_grad():
                error = loss(held_out).item()
            waited = 0 if error < best * (1 - _SMALLEST_GAIN) else waited + 1
            if error < best:
                best, best_pair = error, (second.detach().clone(), third.detach().clone())
            if waited == _PATIENCE:
                break
    bar.close()
    second, third = best_pair
    return torch.cat([left, second.double()], 1), torch.cat([right, third.double()], 0)
