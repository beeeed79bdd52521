"""Streaming moments of rows [n, d], the inputs of a module. Memory is O(d^2) and sums are float64.

Products are float32 for rows of at most that precision, over a few thousand rows at a time. Against float64 that is an
error of some 1e-7 of sqrt(C_ii C_jj) in an entry of C, below what the shrinkage and the ridge add, in a quarter of the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

# Rows of one product, whose rounding errors grow with their number.
_CHUNK_ROWS = 4096
# Columns of one product of a symmetric matrix. Narrower ones leave less of the half below the diagonal to compute, and
# make slower products.
CHUNK_COLUMNS = 256


class SecondMoment:
    """Streaming first, second and fourth moments of rows [n, d], summed in float64."""

    def __init__(self, size: int, device: torch.device):
        self.count, self.size = 0, size
        self.sum = torch.zeros(size, dtype=torch.float64, device=device)
        self.fourth = torch.zeros((), dtype=torch.float64, device=device)
        # Sum of x'x [d, d]; what lies left of the blocks on the diagonal is written when it is asked for.
        self._products = torch.zeros(size, size, dtype=torch.float64, device=device)
        self._blocks = [slice(at, min(at + CHUNK_COLUMNS, size)) for at in range(0, size, CHUNK_COLUMNS)]
        self._whole = True

    def add(self, rows: torch.Tensor) -> None:
        """rows: [n, d], of any floating dtype."""
        self.count += rows.shape[0]
        self._whole = False
        with _exact_products(rows.device):
            for part in rows.detach().split(_CHUNK_ROWS):
                self.sum += part.sum(0, dtype=torch.float64)
                part = part.to(_product_dtype(part))
                for block in self._blocks:
                    self._products[: block.stop, block] += part[:, : block.stop].T @ part[:, block]
                self.fourth += part.square().sum(1, dtype=torch.float64).square().sum()

    @property
    def products(self) -> torch.Tensor:
        """Sum of x'x [d, d] over the rows."""
        if not self._whole:
            for block in self._blocks[1:]:
                self._products[block, : block.start] = self._products[: block.start, block].T
            self._whole = True
        return self._products

    @property
    def rows(self) -> int:
        """How many rows were seen."""
        return self.count

    def is_finite(self) -> bool:
        """Whether all rows were finite. NaN and infinity persist in the sum of fourth powers."""
        return bool(torch.isfinite(self.fourth))

    def second_moment(self) -> torch.Tensor:
        """The uncentred second moment E[x'x] [d, d] of rows x."""
        return self.products / self.count

    def mean_and_covariance(self) -> tuple[torch.Tensor, torch.Tensor]:
        """E[x] [d] and the centred second moment [d, d]."""
        mean = self.sum / self.count
        return mean, self.second_moment() - torch.outer(mean, mean)

    def ledoit_wolf(self) -> float:
        """Shrinkage intensity of the uncentred second moment towards its mean diagonal, in [0, 1].

        It minimises the expected squared error of `shrunk` for independent rows (Ledoit and Wolf, "A
        well-conditioned estimator for large-dimensional covariance matrices", 2004), for the uncentred moment.
        """
        moment = self.second_moment()
        size = moment.shape[0]
        spread = (moment - torch.eye(size, dtype=moment.dtype, device=moment.device) * moment.trace() / size).square()
        distance = spread.sum().item()
        if distance == 0.0:
            return 1.0
        noise = (self.fourth / self.count - moment.square().sum()).item() / self.count
        return min(max(noise / distance, 0.0), 1.0)

    def shrunk(self, intensity: float, centred: bool = False) -> torch.Tensor:
        """`(1 - intensity) C + intensity tr(C)/d I` for the second moment C [d, d], uncentred or centred."""
        moment = self.mean_and_covariance()[1] if centred else self.second_moment()
        mean_energy = moment.trace() / moment.shape[0]
        moment.mul_(1.0 - intensity).diagonal().add_(intensity * mean_energy)
        return moment


class CrossMoment(SecondMoment):
    """Second moment of rows Z [n, d], and their products Z'X [d, d] with other rows X [n, d]."""

    def __init__(self, size: int, device: torch.device):
        super().__init__(size, device)
        self.cross = torch.zeros_like(self._products)
        self.other_sum = torch.zeros_like(self.sum)

    def add_pair(self, rows: torch.Tensor, others: torch.Tensor) -> None:
        self.add(rows)
        with _exact_products(rows.device):
            for part, other in zip(rows.split(_CHUNK_ROWS), others.split(_CHUNK_ROWS), strict=True):
                self.other_sum += other.sum(0, dtype=torch.float64)
                self.cross += part.to(_product_dtype(part)).T @ other.to(_product_dtype(other))

    def means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """E[z] and E[x] [d]."""
        return self.sum / self.count, self.other_sum / self.count

    def cross_moment(self, centred: bool = False) -> torch.Tensor:
        """E[z'x] [d, d] of rows z and x; with `centred`, of rows minus their means."""
        moment = self.cross / self.count
        return moment - torch.outer(*self.means()) if centred else moment


class MeanInput:
    """Streaming mean input of each position [positions, d] over samples: the "representative input".

    Kept for comparison with `SecondMoment`: it averages the samples before the products are taken, so what differs
    between samples is lost.
    """

    def __init__(self, size: int, device: torch.device):
        self.count, self.size = 0, size
        self.sums = torch.zeros(0, size, dtype=torch.float64, device=device)
        self.counts = torch.zeros(0, dtype=torch.float64, device=device)

    def add(self, rows: torch.Tensor, positions: torch.Tensor) -> None:
        """rows: [n, d]; positions: [n], each row's place in its sample."""
        self.count += rows.shape[0]
        new_positions = int(positions.max()) + 1 - len(self.counts) if len(positions) else 0
        if new_positions > 0:
            self.sums = nn.functional.pad(self.sums, (0, 0, 0, new_positions))
            self.counts = nn.functional.pad(self.counts, (0, new_positions))
        self.sums.index_add_(0, positions, rows.double())
        self.counts.index_add_(0, positions, torch.ones_like(positions, dtype=torch.float64))

    @property
    def rows(self) -> int:
        return self.count

    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.sums).all())

    def second_moment(self) -> torch.Tensor:
        """Second moment [d, d] of the mean input; of rank at most the number of positions."""
        seen = self.counts > 0
        mean = self.sums[seen] / self.counts[seen, None]
        return mean.T @ mean / len(mean)


def _product_dtype(rows: torch.Tensor) -> torch.dtype:
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


@contextmanager
def _exact_products(device: torch.device) -> Iterator[None]:
    """No autocast and no TF32: both round the inputs of a product to fewer bits."""
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
