"""Plots of what a pruning method keeps."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch

from hf_qst.pruning.layout import SELECTIONS
from hf_qst.saved.whole_files import whole_file


def require_matplotlib() -> None:
    """Raise now what a plot would raise later.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib.figure  # noqa: F401


def plot_widths(masks: Sequence[Mapping[str, torch.Tensor]], path: str, title: str) -> None:
    """Draw the kept part of each selection by layer; the file is written whole or not at all.

    Args:
        masks: for each layer its five selections by name, bool [size].
        path (`str`): a `.png`; its folder is made.
        title (`str`)

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for name in SELECTIONS:
        axes.plot([float(chosen[name].float().mean()) for chosen in masks], marker="o", markersize=3, label=name)
    axes.set(xlabel="layer", ylabel="kept part", ylim=(0, 1.05), title=title)
    axes.legend(fontsize=8, ncols=3)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
