"""Plots of the widths that a pruning method keeps."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch

from hf_qst.pruning.layout import SELECTIONS
from hf_qst.saved.whole_files import whole_file


def plot_widths(masks: Sequence[Mapping[str, torch.Tensor]], path: str, title: str) -> None:
    """Draw the kept share of each selection by layer.

    Args:
        masks: the five selections of each layer by name, bool [size] each.
        path (`str`): a `.png` file; its folder is created.
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
