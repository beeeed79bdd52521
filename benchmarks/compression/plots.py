"""The plots of the compression benchmark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.plots import heat_maps, pyplot, save_figure
from benchmarks.compression.methods import DEFAULT, METHODS
from benchmarks.compression.report import KINDS


def plots(results: dict, parts: Sequence[str], folder: Path) -> list[Path]:
    """PNG files of what these parts have to show; returns their paths."""
    paths = []
    if "llm" in results and "llm" in parts:
        paths += [_perplexity_plot(results["llm"], folder / "compression_perplexity.png")]
        paths += [_rank_plot(results["llm"], folder / "compression_ranks.png")]
    if "layers" in results and "layers" in parts:
        paths += [
            _error_plot(one, folder / f"compression_errors_{name}.png") for name, one in results["layers"].items()
        ]
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


def _rank_plot(result: dict, path: Path) -> Path:
    """Each layer's part of the weights kept, by block and kind, as the default chose it."""
    shapes = result["dense"]["shapes"]
    kinds = list(dict.fromkeys(name.rsplit(".", 1)[1] for name in shapes))
    table = [[name for name in shapes if name.endswith(f".{kind}")] for kind in kinds]  # [kinds, blocks]
    panels = {}
    for row in sorted((row for row in result["rows"] if row["method"] == DEFAULT), key=lambda row: -row["keep"]):
        ranks = row["ranks"]
        part = lambda name, ranks=ranks: (
            ranks[name] * sum(shapes[name]) / math.prod(shapes[name]) if name in ranks else 1.0
        )
        values, texts = ([[cell(name) for name in names] for names in table]
                         for cell in (part, lambda name, ranks=ranks: str(ranks.get(name, "dense"))))  # fmt: skip
        panels[f"keep {row['keep']:g}: ranks"] = values, texts
    return heat_maps(panels, kinds, "block", "part of the layer's weights kept", path)


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
