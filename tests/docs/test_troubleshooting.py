"""Every message that the troubleshooting page quotes is one that the package prints."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
QUOTED = re.findall(r"^### `(.+)`$", PAGE.read_text(), re.MULTILINE)
FORMAT = re.compile(r"%(?:[+.\d]*)[sdrf]%?")


def text_of(node):
    """A string of the source with an ellipsis for each value that it takes, or None."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return FORMAT.sub("…", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join("…" if isinstance(part, ast.FormattedValue) else part.value for part in node.values)
    return None


def strings():
    for root in ("hf_qst", "kernels", "plugins"):
        for path in (ROOT / root).rglob("*.py"):
            yield from filter(None, map(text_of, ast.walk(ast.parse(path.read_text()))))


STRINGS = list(strings())


@pytest.mark.parametrize("quoted", QUOTED)
def test_message_is_in_the_source(quoted):
    parts = [re.escape(part) for part in quoted.split("…") if part.strip()]
    assert parts and max(map(len, parts)) > 12
    pattern = re.compile(".*".join(parts), re.DOTALL)
    assert any(pattern.search(text) for text in STRINGS)


def test_page_is_not_empty():
    assert len(QUOTED) > 40
