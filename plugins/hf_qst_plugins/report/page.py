"""The page: head, sections, style and script in one file."""

from __future__ import annotations

import json
import os
from html import escape
from pathlib import Path

from hf_qst.saved import write_text

from .sections import SECTIONS
from .tables import pairs

_HERE = Path(__file__).parent


def write_report(record: dict, path: str | os.PathLike) -> None:
    """Write the page of a record to a file."""
    write_text(path, page(record))


def page(record: dict) -> str:
    """The HTML text of a record, as `hf-qst` writes records.

    The tables are in the text; a script draws the plots from data in the page.
    """
    charts: list[dict] = []
    sections = [section for make in SECTIONS if (section := make(record, charts))]
    # A closing tag in a string would end the element.
    data = json.dumps(charts, allow_nan=False).replace("<", "\\u003c")
    model = record["options"].get("model") or ""
    title = f"hf-qst {record['command']} {model}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{_text("report.css")}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<pre class="command">{escape(record["command_line"])}</pre>
{pairs(_head(record))}
{"".join(sections)}
</main>
<div id="tip" role="status" hidden></div>
<script type="application/json" id="charts">{data}</script>
<script>
{_text("charts.js")}</script>
</body>
</html>
"""


def _text(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _head(record: dict) -> list[tuple[str, object]]:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    machine = record["machine"]
    return [
        ("started", record["started"]),
        ("seconds", record["seconds"]),
        ("commit", record["commit"] or "not in a git repository"),
        ("versions", versions),
        ("machine", f"{machine['processor']}, {machine['cores']} cores, {machine.get('gpu', 'no GPU')}"),
    ]
