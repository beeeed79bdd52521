"""What the compression benchmark draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.measure import pyplot, save_figure
from benchmarks.compression.methods import DEFAULT, METHODS
from benchmarks.compression.report import KINDS


def plots(found: dict, parts: Sequence[str], folder: Path) -> list[Path]:
    """PNG files of what these parts have to show; returns their paths."""
    paths = []
    if "llm" in found and "llm" in parts:
        paths += [_perplexity_plot(found["llm"], folder / "compression_perplexity.png")]
        paths += [_rank_plot(found["llm"], folder / "compression_ranks.png")]
    if "layers" in found and "layers" in parts:
        paths += [_error_plot(one, folder / f"compression_errors_{name}.png") for name, one in found["layers"].items()]
    return paths


def _perplexity_plot(result: dict, path: Path) -> Path:
    figure, every = pyplot().subplots(1, len(KINDS), figsize=(13, 4), sharex=True)
    for axes, (kind, title) in zip(every, KINDS.items(), strict=True):
        for method in (name for name in METHODS if any(row["method"] == name for row in result["rows"])):
            rows = sorted((r["keep"], r["perplexity"][kind]) for r in result["rows"] if r["method"] == method)
            style = "--" if METHODS[method].baseline else "-"
            axes.plot(*zip(*rows, strict=True), style, marker="o", markersize=3, label=METHODS[method].label)
        axes.axhline(result["dense"]["perplexity"][kind], color="black", linewidth=0.8)
        axes.set(yscale="log", title=title, xlabel="part of the weights kept")
        axes.grid(alpha=0.3)
    every[0].set_ylabel("held-out perplexity (line: dense)")
    every[-1].legend(fontsize=7)
    return save_figure(figure, path)


def _block(name: str) -> int:
    return next(int(part) for part in name.split(".") if part.isdigit())


def _rank_plot(result: dict, path: Path) -> Path:
    """Each layer's part of the weights kept, by block and kind, as the default chose it."""
    rows = sorted((row for row in result["rows"] if row["method"] == DEFAULT), key=lambda row: -row["keep"])
    shapes = result["dense"]["shapes"]
    kinds = list(dict.fromkeys(name.rsplit(".", 1)[1] for name in shapes))
    blocks = sorted({_block(name) for name in shapes})
    figure, every = pyplot().subplots(1, len(rows), figsize=(4.2 * len(rows), 4), squeeze=False, layout="constrained")
    for axes, row in zip(every[0], rows, strict=True):
        grid = [[0.0] * len(blocks) for _ in kinds]
        for name, (d_in, d_out) in shapes.items():
            y, x = kinds.index(name.rsplit(".", 1)[1]), blocks.index(_block(name))
            rank = row["ranks"].get(name)
            grid[y][x] = 1.0 if rank is None else rank * (d_in + d_out) / (d_in * d_out)
            ink = "white" if grid[y][x] > 0.5 else "black"
            axes.text(x, y, "dense" if rank is None else str(rank), ha="center", va="center", fontsize=7, color=ink)
        image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis_r", aspect="auto")
        axes.set(title=f"keep {row['keep']:g}: ranks", xlabel="block", xticks=range(len(blocks)))
        axes.set_yticks(range(len(kinds)), kinds)
    figure.colorbar(image, ax=every[0].tolist(), label="part of the layer's weights kept")
    return save_figure(figure, path)


def _error_plot(result: dict, path: Path) -> Path:
    figure, (alone, inside) = pyplot().subplots(2, 1, figsize=(11, 7), layout="constrained")
    rows = result["by_itself"]
    lines = (("held_plain", "plain SVD"), ("held", "ours"), ("floor", "least possible on this data"))
    for key, label in lines:
        alone.plot([row[key] for row in rows], marker=".", label=label)
    alone.set_title(f"each layer by itself, at the ranks of keep {result['keep']:g}")
    for method, errors in result["in_the_model"].items():
        inside.plot(list(errors.values()), marker=".", label=METHODS[method].label)
    inside.set_title("each layer in the compressed model, against the dense model's")
    for axes, names in (alone, [row["name"] for row in rows]), (inside, list(errors)):
        axes.set_xticks(range(len(names)), [name.split("layers.")[-1] for name in names], rotation=90, fontsize=6)
        axes.set(yscale="log", ylabel="error on held-out inputs")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return save_figure(figure, path)
