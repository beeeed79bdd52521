"""Stage 1: the best factors of one weight for the inputs it sees.

A linear layer is y = x W + b with W [d_in, d_out]; C = E[x'x] [d_in, d_in] is the second moment of its rows x. The
rank-r W^ that minimises E||x W - x W^||^2 is W V V', where V [d_out, r] holds the leading eigenvectors of W'CW; the
error is the sum of the other eigenvalues. No inverse is needed, and C need not have full rank.
"""

from __future__ import annotations

import torch

# Directions that no input excites are ordered by the weight itself; far below what the others' errors can show.
_NULL_SPACE_RIDGE = 1e-12


class _Problem:
    """The symmetric eigenproblem of one layer, on the smaller of its two sides, in float64 and in units of the mean
    input. Without a moment C is the identity, and the solution that of the plain SVD of W.

    Its eigenvalues are the output energies. On the output side its matrix is W'CW. On the input side, with C = R'R, it
    is R W W'R', which has the same eigenvalues, and whose eigenvectors U span the output directions as U'R W.
    """

    def __init__(self, weight: torch.Tensor, moment: torch.Tensor | None):
        self.unit = 1.0
        self.scaled: torch.Tensor | None = None
        if moment is not None:
            self.unit = (moment.trace() / len(moment)).to(weight.device)
            moment = moment.double().to(weight.device) / self.unit
            moment.diagonal().add_(_NULL_SPACE_RIDGE)
        if weight.shape[1] <= weight.shape[0]:
            self.matrix = weight.T @ (weight if moment is None else moment @ weight)
        else:
            self.scaled = weight if moment is None else _square_root(moment) @ weight
            self.matrix = self.scaled @ self.scaled.T

    def energies(self) -> torch.Tensor:
        """[m], descending."""
        return torch.linalg.eigvalsh(self.matrix).flip(0).clamp(min=0) * self.unit

    def directions(self, rank: int) -> torch.Tensor:
        """Orthonormal output directions [d_out, rank], by descending energy."""
        vectors = torch.linalg.eigh(self.matrix).eigenvectors.flip(1)[:, :rank]
        if self.scaled is None:
            return vectors
        return torch.linalg.qr(_unit_rows(vectors.T @ self.scaled).T).Q


def _or_plain(moment: torch.Tensor | None) -> torch.Tensor | None:
    # Where no input is ever anything but zero, all factors are equally good; the plain ones are as safe as any.
    return None if moment is None or moment.trace() <= 0 else moment


def _unit_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows of length 1, so that an orthonormal basis treats weak directions as it treats strong ones."""
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)


def _square_root(moment: torch.Tensor) -> torch.Tensor:
    """R [d, d] with R'R = C."""
    lower, failed = torch.linalg.cholesky_ex(moment)
    if not failed:
        return lower.T
    values, vectors = torch.linalg.eigh(moment)
    return values.clamp(min=0).sqrt()[:, None] * vectors.T


def output_energies(weight: torch.Tensor, moment: torch.Tensor | None = None) -> torch.Tensor:
    """Energies [min(d_in, d_out)] of a layer's output along its principal directions, descending.

    The best factors of rank r leave the error `energies[r:].sum()`, a mean over rows.
    """
    return _Problem(weight.double(), _or_plain(moment)).energies()


def factorize(
    weight: torch.Tensor, rank: int, moment: torch.Tensor | None = None, balance: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best factors of a weight for inputs with this second moment.

    Args:
        weight: [d_in, d_out].
        rank (`int`): from 1 to min(d_in, d_out).
        moment: C [d_in, d_in], or None for the plain SVD.
        balance (`bool`): share the scale evenly: better to train and to quantise; the product is the same.

    Returns:
        A [d_in, rank] and B [rank, d_out] in float64, on the weight's device.

    Raises:
        ValueError: a rank out of its range, or a weight that is not finite.
    """
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"rank must be from 1 to {min(weight.shape)} for a {list(weight.shape)} weight, got {rank}")
    if not torch.isfinite(weight).all():
        raise ValueError(f"weight [{weight.shape[0]}, {weight.shape[1]}] holds NaN or infinite values")
    weight = weight.double()
    right = _Problem(weight, _or_plain(moment)).directions(rank).T
    left = weight @ right.T
    return _balanced(left, right) if balance else (left, right)


def _balanced(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors with the same product and the same scale: with left = P S Z', P sqrt(S) and sqrt(S) Z' right.

    Z and S^2 are of the eigenproblem of left'left [rank, rank]. Singular values below the root of the precision come out
    inexact, and with them the balance of their directions, but not the product: Z is orthogonal all the same.
    """
    energies, rotation = torch.linalg.eigh(left.T @ left)
    energies, rotation = energies.flip(0), rotation.flip(1)
    least = torch.finfo(energies.dtype).eps * energies[0] + torch.finfo(energies.dtype).tiny
    root = energies.clamp(min=least) ** 0.25
    return left @ rotation / root, root[:, None] * (rotation.T @ right)


def output_error(difference: torch.Tensor, moment: torch.Tensor | None) -> float:
    """E||x D||^2 for D [d_in, d_out] and inputs x with this second moment."""
    difference = difference.double()
    if moment is None:
        return difference.square().sum().item()
    return ((moment.double() @ difference) * difference).sum().item()
