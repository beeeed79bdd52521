"""Fixtures of the kernels' tests."""

import pytest

from tests.kernels.compared import poison


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory holds NaN (or -128), so that a result nobody wrote to shows."""
    poison(monkeypatch.setattr)
