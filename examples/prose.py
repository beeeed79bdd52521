"""English prose that no model here was tuned on: the Debian Administrator's Handbook, from a Debian package.

apt-get download debian-handbook && dpkg -x debian-handbook_*.deb ~/.cache/hf_qst/debian-handbook    # once

files, held = split(handbook_files())           # as the other corpora of `examples.corpus`
"""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from examples.corpus import SourceFile, cache_folder

PLACES = ("usr/share/doc/debian-handbook/html/en-US", "share/doc/debian-handbook/html/en-US")
_SKIPPED = {"script", "style", "head", "nav", "pre"}
_BREAKS = {"p", "div", "li", "h1", "h2", "h3", "h4", "tr", "dt", "dd", "br"}


class NoTextError(FileNotFoundError):
    """The corpus is not on this machine; the message says how to get it."""


class _Prose(HTMLParser):
    """Collects the text outside of code and navigation, one line a paragraph."""

    def __init__(self):
        super().__init__()
        self.parts: list[str] = []
        self.skipped = 0

    def handle_starttag(self, tag, attrs):
        if tag in _SKIPPED or ("class", "docnav") in attrs or (self.skipped and tag in ("ul", "div")):
            self.skipped += 1
        if tag in _BREAKS:
            self.parts.append("\n")

    def handle_endtag(self, tag):
        if self.skipped and (tag in _SKIPPED or tag in ("ul", "div")):
            self.skipped -= 1

    def handle_data(self, data):
        if not self.skipped:
            self.parts.append(" ".join(data.split()) + " " if data.strip() else "")

    def text(self) -> str:
        lines = (" ".join(line.split()) for line in "".join(self.parts).split("\n"))
        # Headings, menus and numbers are no prose.
        return "\n".join(line for line in lines if len(line) >= 80)


def handbook_files(folder: str | Path | None = None) -> list[SourceFile]:
    """The handbook's pages as plain text, sorted by name.

    Raises:
        NoTextError: the handbook is neither installed nor unpacked into the cache.
    """
    roots = [Path(folder)] if folder else [Path("/"), cache_folder() / "debian-handbook"]
    for html in (root / place for root in roots for place in PLACES):
        if html.is_dir():
            files = []
            for path in sorted(html.glob("*.html")):
                parser = _Prose()
                parser.feed(path.read_text(encoding="utf-8"))
                if len(text := parser.text()) >= 1000:
                    files.append(SourceFile(path.name, text))
            return files
    raise NoTextError(
        "the Debian Administrator's Handbook is not on this machine. Get it with: apt-get download debian-handbook && "
        f"dpkg -x debian-handbook_*.deb {cache_folder() / 'debian-handbook'}"
    )
