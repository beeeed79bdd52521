"""What the site adds to MkDocs: pages and files from outside `docs/`, parts of the README, pictures, equations.

Pages are written for GitHub as well: their links are relative paths in the repository. Here a link that leaves `docs/`
gets a copy of the file that it names; one that names no file fails the build.
"""

import json
import os
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

DOCS = Path(__file__).parent
ROOT = DOCS.parent
# Pages that lie where GitHub expects them.
PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "README.md": "index.md",
    "examples/notebooks/side_tuning.ipynb": "notebooks/side_tuning.md",
    "examples/notebooks/smaller_models.ipynb": "notebooks/smaller_models.md",
}
LINK = re.compile(r"(?<!`)(!?\[[^\]]*\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
EXTERNAL = re.compile(r"[a-z]+:")
SECTION = re.compile(r"^\{\{ README: (.+) \}\}$", re.MULTILINE)
LOADED = re.compile(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"']?(?:https?:)?//[^\"' >]+")
TYPE = re.compile(r"<code>(`[^<]*)</code>")
SVG = re.compile(r"^!\[([^\]]*)\]\(([\w/]+\.svg)\)$", re.MULTILINE)


def math(source, language, css_class, options, md, **kwargs):
    """A fenced block of LaTeX as MathML, which browsers draw themselves."""
    return f'<div class="{css_class}">{convert(source, display="block")}</div>'


def place(path: Path) -> str | None:
    """Where a file of the repository is in the site, or None if there is no such file."""
    if not path.exists() or not path.is_relative_to(ROOT):
        return None
    name = str(path.relative_to(ROOT))
    if path.is_relative_to(DOCS) or name in PAGES:
        return PAGES.get(name) or name.removeprefix("docs/")
    # Text that a browser would run or lay out is shown as text.
    return f"repository/{name}" + ("" if path.suffix in (".png", ".json") else ".txt")


def linked(text: str, source: Path, page: str) -> str:
    """Text of the file `source` with its links as the page `page` of the site needs them."""

    def relative(found):
        before, target, after = found.groups()
        where = None if EXTERNAL.match(target) else place((source.parent / target).resolve())
        return f"{before}{os.path.relpath(where, os.path.dirname(page) or '.')}{after}" if where else found.group()

    return LINK.sub(relative, text)


def readme_section(heading: str) -> str:
    """The text below a heading of the README, up to the next heading or block of code."""
    parts = re.split(rf"^## {re.escape(heading)}$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    if len(parts) != 2:
        raise ValueError(f"README.md must have one heading {heading!r}, it has {len(parts) - 1}")
    return re.split(r"^(?:## |```)", parts[1], flags=re.MULTILINE)[0].strip()


def notebook(path: Path) -> str:
    """A notebook as a page: its text, its code, and what the code printed."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        printed = "".join(
            "".join(output.get("text", "")) for output in cell.get("outputs", ()) if output.get("name") == "stdout"
        )
        parts += [f"```text\n{printed.rstrip()}\n```"] if printed else []
    return "\n\n".join(parts) + f"\n\nThe notebook is `{path.relative_to(ROOT)}`.\n"


def on_config(config):
    """Makes fenced blocks of the language `math` equations."""
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [{"name": "math", "class": "math", "format": math}]}
    return config


def on_files(files, config):
    """Adds the pages at the root of the repository, and every file outside `docs/` to which a page links."""
    sources = [ROOT / name for name in PAGES]
    sources += [Path(file.abs_src_path) for file in files.documentation_pages()]
    for name, page in PAGES.items():
        if name.endswith(".ipynb"):
            files.append(File.generated(config, page, content=notebook(ROOT / name)))
        elif page != "index.md":
            files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    for source in sources:
        for _, target, _ in LINK.findall(source.read_text()):
            path = (source.parent / target).resolve()
            where = None if EXTERNAL.match(target) else place(path)
            if where and where.startswith("repository/") and where not in files.src_uris:
                content = path.read_bytes() if path.is_file() else "\n".join(sorted(os.listdir(path)))
                files.append(File.generated(config, where, content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    """Puts in the parts of the README and the pictures, and points links into the site."""
    if page.file.abs_src_path is None:  # made here
        return markdown
    source = Path(page.file.abs_src_path)
    text = linked(markdown, source, page.file.src_uri)
    text = SECTION.sub(lambda found: linked(readme_section(found[1]), ROOT / "README.md", page.file.src_uri), text)
    return SVG.sub(lambda found: f"<div>\n{(source.parent / found[2]).read_text()}</div>", text)


def on_page_content(html, page, config, files):
    """Takes the Markdown out of the types of parameters, which PEFT's form of docstrings has there."""
    return TYPE.sub(lambda found: f"<code>{re.sub('[`*]', '', found[1])}</code>", html)


def on_post_page(output, page, config):
    """Refuses a page that would load something from another host."""
    if found := LOADED.search(output):
        raise PluginError(f"{page.file.src_uri} loads from the network: {found.group()}")
    return output
