"""Budgets of parameters, as compressing methods take them."""

from __future__ import annotations

from dataclasses import dataclass


class BudgetError(ValueError):
    """A budget of parameters that no choice meets; `smallest` is the least number of parameters that one does."""

    def __init__(self, message: str, smallest: int):
        super().__init__(message)
        self.smallest = smallest


@dataclass(frozen=True)
class Budget:
    """What a method may keep of the weights that it changes.

    Args:
        keep_ratio (`float`): the part to keep.
        scope (`str`): of what: `"targets"`, the weights that the method changes, or `"model"`, all parameters.
        targets (`int`): number of the weights that the method changes.
        others (`int`): all other parameters of the model, which stay.
    """

    keep_ratio: float
    scope: str
    targets: int
    others: int

    @property
    def fixed(self) -> int:
        """Parameters in the scope that stay whatever is chosen."""
        return self.others if self.scope == "model" else 0

    @property
    def parameters(self) -> int:
        """How many of the targets' weights may be kept."""
        return int(self.keep_ratio * (self.targets + self.fixed)) - self.fixed

    def error(self, owner: str, smallest: int, how: str) -> BudgetError:
        """The error to raise where at least `smallest` of the targets' weights remain.

        Args:
            owner (`str`): put before `keep_ratio` in the message, such as `"DISPConfig."`.
            smallest (`int`)
            how (`str`): the choice that keeps the least.
        """
        total = self.targets + self.fixed
        # Rounded up, so that the ratio in the message is one that can be met.
        ratio = -(-(smallest + self.fixed) * 10_000 // total) / 10_000
        return BudgetError(
            f"{owner}keep_ratio={self.keep_ratio} of the {self.scope}'s {total} parameters cannot be met "
            f"{how}: {smallest + self.fixed} remain, so keep_ratio must be at least {ratio:.4f}",
            smallest + self.fixed,
        )
