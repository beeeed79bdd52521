"""Budgets of parameters, as compressing methods take them."""

from __future__ import annotations


class BudgetError(ValueError):
    """A budget of parameters that no choice meets; `smallest` is the least number of parameters that one does."""

    def __init__(self, message: str, smallest: int):
        super().__init__(message)
        self.smallest = smallest
