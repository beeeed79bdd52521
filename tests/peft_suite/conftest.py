"""Which of PEFT's tests run here, which are expected to fail, and from where they find their models.

python -m pytest tests/peft_suite                       all of them, about two minutes
python -m pytest tests/peft_suite -k MixedRankConfig    one method
"""

from pathlib import Path

import pytest

from tests.peft_suite import base_models, configurations, expected, peft_tests

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config, items):
    others = {item for item in items if _is_of_peft(item) and _method(item) not in configurations.METHODS}
    if others:
        config.hook.pytest_deselected(items=list(others))
        items[:] = [item for item in items if item not in others]
    for item in items:
        reason = _reason(item) if _is_of_peft(item) else None
        if reason is not None:
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))


def _is_of_peft(item) -> bool:
    return HERE in item.path.parents and item.function.__module__.startswith(peft_tests.PACKAGE)


def _parameters(item) -> dict:
    return item.callspec.params if hasattr(item, "callspec") else {}


def _method(item) -> type | None:
    """The configuration that a test runs with; None where it is of one method of PEFT's own."""
    return _parameters(item).get("config_cls")


def _reason(item) -> str | None:
    """Why a test is expected to fail."""
    identity = f"{item.callspec.id} {base_models.STAND_INS.get(_parameters(item).get('model_id'))}"
    for key, reason in expected.failures(_method(item).method).items():
        name, _, part = key.removesuffix("]").partition("[")
        if name == item.originalname and part in identity:
            return reason
    return None


@pytest.fixture(scope="session")
def _models(tmp_path_factory):
    return base_models.make(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def _among_the_models(request, monkeypatch):
    if _is_of_peft(request.node):
        monkeypatch.chdir(request.getfixturevalue("_models"))
