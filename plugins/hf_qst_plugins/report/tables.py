"""Tables of figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def shown(value: object) -> str:
    """A value as text: whole numbers in full, others with six digits."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return escape(str(value))
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def table(head: Sequence[str], rows: Iterable[Sequence], name: str) -> str:
    """A table whose first column says what a row is; `name` is its id."""
    lines = "".join(
        f'<tr><th scope="row">{shown(first)}</th>{"".join(f"<td>{shown(value)}</td>" for value in rest)}</tr>'
        for first, *rest in rows
    )
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    return f'<div class="wide"><table id="{name}"><thead><tr>{columns}</tr></thead><tbody>{lines}</tbody></table></div>'


def pairs(rows: Iterable[tuple[str, object]]) -> str:
    """A list of names and values."""
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{shown(value)}</dd>" for name, value in rows) + "</dl>"
