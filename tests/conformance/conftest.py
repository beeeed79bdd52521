"""Every test here that takes `line` runs for every method."""

import pytest

from tests.conformance.methods import LINES


@pytest.fixture(params=LINES)
def line(request):
    return LINES[request.param]
