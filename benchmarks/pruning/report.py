"""The tables and plots of the pruning benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.common.parts import text_of
from benchmarks.common.plots import heat_maps, pyplot, save_figure
from benchmarks.common.tables import MIB, interval, markdown, pm, verdict
from benchmarks.compression.llm import perplexity
from benchmarks.compression.report import KINDS
from benchmarks.pruning.cost import STEPS
from benchmarks.pruning.methods import BASELINES, DEFAULT, LABELS, METHODS
from hf_qst.pruning import SELECTIONS

# Below the budget by at most this part of it.
TOLERANCE = 0.002
PREFILL_AIM, DECODE_AIM = 1.4, 1.0
TITLES = {**KINDS, "code": "code", "handbook": "prose"}


def _label(method: str) -> str:
    return f"**{LABELS[method]}**" if method == DEFAULT else LABELS[method]


def _titles(result: dict) -> dict[str, str]:
    """The kinds of text by the names that the tables give them."""
    return {kind: TITLES[kind] for kind in result["dense"]["perplexity"]}


def _columns(result: dict) -> list[str]:
    """Of the perplexities before and after the recovery."""
    titles = _titles(result).values()
    return [*titles, *(f"{title}, recovered" for title in titles)]


def _perplexities(row: dict) -> list[str]:
    return [f"{value:,.0f}" if value >= 1000 else f"{value:.2f}" for value in row["perplexity"].values()]


def _ordered(rows: Sequence[dict]) -> list[dict]:
    names = list(LABELS)
    return sorted(rows, key=lambda row: (-row["keep"], names.index(row["method"])))


def quality_table(result: dict) -> str:
    """One seed of everything: perplexities before and after the recovery, seconds of finding out what to prune."""
    dense, count = result["dense"], len(_titles(result))
    lines = [["1", "dense", f"{dense['parameters']:,}", *_perplexities(dense)]]
    for row in _ordered([row for row in result["rows"] if row["seed"] == 0]):
        after = _perplexities(row["recovered"]) if "recovered" in row else [""] * count
        head = [f"{row['keep']:g}", _label(row["method"]), f"{row['parameters']:,}"]
        lines.append([*head, *_perplexities(row), *after, f"{row.get('learning_seconds', row['seconds']):.0f}"])
    return markdown(["keep", "method", "parameters", *_columns(result), "s"], lines)


def seed_table(result: dict) -> str:
    """Mean and Student's 95 % interval over the seeds, where there are several."""
    pairs = list(dict.fromkeys((row["keep"], row["method"]) for row in _ordered(result["rows"])))
    lines = []
    for keep, method in pairs:
        rows = [row for row in result["rows"] if (row["keep"], row["method"]) == (keep, method)]
        if len(rows) > 1:
            after = [row["recovered"] for row in rows if "recovered" in row]
            cells = [
                pm(interval([one["perplexity"][kind] for one in ones]), 2) if len(ones) == len(rows) else ""
                for ones in (rows, after)
                for kind in _titles(result)
            ]
            lines.append([f"{keep:g}", _label(method), str(len(rows)), *cells])
    return markdown(["keep", "method", "seeds", *_columns(result)], lines) if lines else ""


def aims(result: dict) -> str:
    """Whether DISP is below every baseline at every part kept and on every text, and on its budget.

    The gaps in loss are means over parts of the text with Student's 95 % interval.
    """
    at = {(row["keep"], row["method"]): row for row in result["rows"] if row["seed"] == 0}
    lines = []
    for keep in sorted({keep for keep, _ in at}, reverse=True):
        for what, pick in (("", lambda row: row), (" after recovery", lambda row: row.get("recovered"))):
            ours = pick(at.get((keep, DEFAULT), {}))
            others = {name: pick(at[keep, name]) for name in BASELINES if (keep, name) in at}
            others = {name: row for name, row in others.items() if row}
            for kind, title in _titles(result).items() if ours and others else ():
                best = min(others, key=lambda name: perplexity(others[name]["losses"][kind]))
                mine, theirs = ours["losses"][kind], others[best]["losses"][kind]
                gap = pm(interval([a - b for a, b in zip(mine, theirs, strict=True)]), 3)
                lines.append(
                    f"keep {keep:g}, {title}{what}: DISP {perplexity(mine):.2f}, best baseline "
                    f"({LABELS[best]}) {perplexity(theirs):.2f}, {gap} nats: {verdict(sum(mine) < sum(theirs))}"
                )
    learned = [row for row in result["rows"] if "threshold_ratio" in row]
    worst = max((row["below_budget"] for row in learned if row["method"] != "disp-64"), default=0.0)
    if learned:
        met = 0 <= worst <= TOLERANCE
        lines.append(f"farthest below its budget, DISP at widths as learned: {worst:.4%}: {verdict(met)}")
    return "\n".join(lines)


def width_table(result: dict) -> str:
    """Widths by layer of the default at each part kept."""
    lines = []
    for row in _ordered([row for row in result["rows"] if row["method"] == DEFAULT and row["seed"] == 0]):
        for i, widths in enumerate(row["widths"]):
            lines.append([f"{row['keep']:g}", str(i), *map(str, widths)])
    return markdown(["keep", "layer", *SELECTIONS], lines) if lines else ""


def speed_table(result: dict) -> str:
    lines = []
    for name in (name for name in ("base", "100m") if name in result):
        for row in result[name]:
            cells = [f"{row[f'{kind}_tokens_per_second']:.0f}" for kind in ("prefill", "decode")]
            cells += [f"{row[f'{kind}_{what}']:.2f}" for kind in ("prefill", "decode") for what in ("speedup", "floor")]
            cells += [f"{row[key] / MIB:.1f}" for key in ("weights_bytes", "prefill_peak_bytes")]
            lines.append([f"{name}, {row['model']}", *cells])
    columns = ["prefill tokens/s", "decode tokens/s", "prefill / dense", "at most", "decode / dense", "at most"]
    return markdown(["model", *columns, "weights MiB", "prefill's peak MiB"], lines)


def speed_aims(result: dict) -> str:
    lines = []
    for name in (name for name in ("base", "100m") if name in result):
        for row in result[name]:
            if row["model"] == "dense":
                continue
            what = f"keep {result['keep']:g}, {name}, {row['model']}"
            if row["model"] != "as learned":
                value = row["prefill_speedup"]
                lines.append(
                    f"{what}: prefill {value:.2f} of dense, aim {PREFILL_AIM}: {verdict(value >= PREFILL_AIM)}"
                )
            value = row["decode_speedup"]
            lines.append(f"{what}: decode {value:.2f} of dense, aim {DECODE_AIM}: {verdict(value >= DECODE_AIM)}")
    return "\n".join(lines)


def training_table(result: dict) -> str:
    lines = []
    for row in result["rows"]:
        cells = [f"{row['seconds'] * 1e3:.0f}", f"{row['of_floor']:.2f}"]
        cells += [f"{row[key] / MIB:.1f}" for key in ("kept_bytes", "optimizer_bytes", "peak_bytes")]
        lines.append([STEPS[row["method"]][0], *cells, f"{row['trainable']:,}"])
    columns = ["step ms", "of the first", "kept MiB", "optimiser MiB", "peak RSS MiB", "trainable"]
    return markdown([f"a step of {result['batch']} rows", *columns], lines)


def draws_table(result: dict) -> str:
    lines = [["dense", f"{result['dense']:.3f}", "100 %", "100 %"]]
    lines.append(["Fisher scores, hardened", f"{result['hardened']:.3f}", *[f"{result['keep']:.1%}"] * 2])
    for row in result["rows"]:
        start = "the paper's start" if row["start"] is None else "Fisher scores, largest logit {:g}, slope {:g}"
        cells = [f"{row['drawn']:.3f}", f"{row['ratio']:.1%}", f"{row['threshold_ratio']:.1%}"]
        lines.append([start.format(*row["start"] or ()) + ", drawn", *cells])
    return markdown(["channels", "loss", "kept", "kept by the threshold"], lines)


TABLES = {
    "quality": [quality_table, seed_table, aims, width_table],
    "speed": [speed_table, speed_aims],
    "training": [training_table],
    "draws": [draws_table],
}
report = partial(text_of, TABLES)


def plots(results: dict, parts: Sequence[str], folder: Path, stem: str = "pruning") -> list[Path]:
    """PNG files of what these parts have to show, whose names begin with `stem`; returns their paths."""
    if "quality" not in results or "quality" not in parts:
        return []
    paths = [_perplexity_plot(results["quality"], folder / f"{stem}_perplexity.png")]
    if any(row["method"] == DEFAULT for row in results["quality"]["rows"]):
        paths.append(_width_plot(results["quality"], folder / f"{stem}_widths.png"))
    return paths


def _perplexity_plot(result: dict, path: Path) -> Path:
    titles = _titles(result)
    figure, grid = pyplot().subplots(2, len(titles), figsize=(13, 8), sharex=True, sharey=True)
    first = [row for row in result["rows"] if row["seed"] == 0 and row["method"] in METHODS]
    for every, what, pick in (
        (grid[0], "pruned", lambda row: row),
        (grid[1], "recovered", lambda row: row["recovered"]),
    ):
        rows = [row for row in first if what == "pruned" or "recovered" in row]
        for axes, (kind, title) in zip(every, titles.items(), strict=True):
            dense = result["dense"]["perplexity"][kind]
            for method in (name for name in METHODS if any(row["method"] == name for row in rows)):
                points = sorted((r["keep"], pick(r)["perplexity"][kind] / dense) for r in rows if r["method"] == method)
                style, width = "--" if METHODS[method].baseline else "-", 2.5 if method == DEFAULT else 1.2
                axes.plot(
                    *zip(*points, strict=True), style, marker="o", markersize=4, linewidth=width, label=LABELS[method]
                )
            # What is far off would press the others into one line.
            axes.set(ylim=(0.97, 2), title=f"{title}, {what}")
            axes.grid(alpha=0.3)
        every[0].set_ylabel("held-out perplexity / dense")
    for axes in grid[1]:
        axes.set_xlabel("part of the blocks' matrices kept")
    grid[0][-1].legend(fontsize=7)
    return save_figure(figure, path)


def _width_plot(result: dict, path: Path) -> Path:
    """Part of each selection that stays, by layer."""
    full = [max(column) for column in zip(*result["full_widths"], strict=True)]
    panels = {}
    for row in _ordered([row for row in result["rows"] if row["method"] == DEFAULT and row["seed"] == 0]):
        widths = list(zip(*row["widths"], strict=True))  # [selections, layers]
        values = [[width / most for width in line] for line, most in zip(widths, full, strict=True)]
        panels[f"keep {row['keep']:g}: channels"] = values, [list(map(str, line)) for line in widths]
    return heat_maps(panels, SELECTIONS, "layer", "part of the selection kept", path)
