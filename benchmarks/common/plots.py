"""Figures of the benchmarks, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hf_qst.saved import whole_file


def pyplot():
    """matplotlib's pyplot, for files alone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(figure, path: Path) -> Path:
    """Write a matplotlib figure as PNG, whole or not at all, and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120, bbox_inches="tight")
    pyplot().close(figure)
    return path


def heat_maps(
    panels: Mapping[str, tuple[Sequence[Sequence[float]], Sequence[Sequence[str]]]],
    kinds: Sequence[str],
    columns: str,
    label: str,
    path: Path,
) -> Path:
    """Parts between 0 and 1 as colours, with a text in each cell.

    Args:
        panels: title -> values and texts, [kinds, columns].
        kinds: names of the rows.
        columns: what the columns count.
        label: of the colours.
    """
    size = (4.2 * len(panels), 3.8)
    figure, (every,) = pyplot().subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axes, (title, (values, texts)) in zip(every, panels.items(), strict=True):
        image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis_r", aspect="auto")
        for y, row in enumerate(texts):
            for x, text in enumerate(row):
                ink = "white" if values[y][x] > 0.5 else "black"
                axes.text(x, y, text, ha="center", va="center", fontsize=7, color=ink)
        axes.set(title=title, xlabel=columns, xticks=range(len(values[0])))
        axes.set_yticks(range(len(kinds)), kinds)
    figure.colorbar(image, ax=every.tolist(), label=label)
    return save_figure(figure, path)
