"""The table and the picture of side tuning on a real model."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean

from benchmarks.common.plots import pyplot, save_figure
from benchmarks.common.tables import MIB, markdown

PICTURED = "prose"
# The same training with gradient checkpointing: the losses are those of the second.
SAME_LOSS = {f"{name}, checkpointed": name for name in ("QLoRA", "tail 10", "tail 20", "tail 29")}
MOST_RATES = 6


def best_rate(runs: list[dict]) -> float:
    """The best rate of one method's runs: of the lowest mean loss, over the seeds that every rate has, if any.

    It is the validation loss, or the held-out one where some of these runs are from before there was a validation; a loss
    that is not finite is infinite.
    """
    by_rate: dict[float, list[dict]] = {}
    for run in runs:
        by_rate.setdefault(run["rate"], []).append(run)
    shared = set.intersection(*({run["seed"] for run in those} for those in by_rate.values()))
    compared = {rate: [run for run in by_rate[rate] if run["seed"] in shared] or by_rate[rate] for rate in by_rate}
    validated = all("validation_loss" in run for those in compared.values() for run in those)

    def criterion(rate: float) -> float:
        losses = [run["validation_loss" if validated else "loss"] for run in compared[rate]]
        return mean(losses) if all(map(math.isfinite, losses)) else math.inf

    return min(by_rate, key=criterion)


def next_rate(runs: list[dict]) -> list[float]:
    """The rate to try after one method's runs with one seed: twice or half the best while that is the largest or smallest;
    none once it lies between two others, or after `MOST_RATES`."""
    best, rates = best_rate(runs), {run["rate"] for run in runs}
    if len(rates) >= MOST_RATES:
        return []
    return [2 * best] if best == max(rates) else [best / 2] if best == min(rates) else []


def best_runs(runs: list[dict]) -> dict[str, list[dict]]:
    """Each method's runs at its best rate."""
    by_method: dict[str, list[dict]] = {}
    for run in runs:
        by_method.setdefault(run["method"], []).append(run)
    rates = {name: best_rate(those) for name, those in by_method.items()}
    return {name: [run for run in those if run["rate"] == rates[name]] for name, those in by_method.items()}


def table(result: dict) -> str:
    """Of every task and number of steps: each method at its best rate, mean over the seeds."""
    lines = []
    for key, task in sorted(result["tasks"].items()):
        start, best = task["base"], best_runs(task["runs"])
        full = start["loss"] - mean(run["loss"] for run in best["QLoRA"]) if "QLoRA" in best else math.nan
        rows = [["base", "", "", f"{start['loss']:.3f}", "", *_percent([start]), f"{start['old_loss']:.3f}"]]
        for name, chosen in best.items():
            loss, rate = mean(run["loss"] for run in chosen), chosen[0]["rate"]
            spread = max(run["loss"] for run in chosen) - min(run["loss"] for run in chosen)
            rows.append(
                [
                    name,
                    f"{rate:g}",
                    str(len(chosen)),
                    f"{loss:.3f}" + (f" ({spread:.3f})" if len(chosen) > 1 else ""),
                    "" if math.isnan(full) else f"{100 * (start['loss'] - loss) / full:.0f} %",
                    *_percent(chosen),
                    f"{mean(run['old_loss'] for run in chosen):.3f}",
                    f"{chosen[0]['parameters'] / 1000000.0:.2f}",
                ]
            )
        classes = ["accuracy"] if "accuracy" in start else []
        head = ["", "rate", "seeds", "loss (range)", "of QLoRA's gain", *classes, "old text", "M parameters"]
        lines += [f"{key} steps", markdown(head, rows), ""]
    if "cost" in result:
        rows = [
            [name, f"{row['seconds']:.2f}", f"{row['kept_bytes'] / MIB:.0f}"] for name, row in result["cost"].items()
        ]
        lines += ["one step in the model", markdown(["", "seconds", "kept MiB"], rows)]
    return "\n".join(lines)


def _percent(runs: list[dict]) -> list[str]:
    return [f"{mean(run['accuracy'] for run in runs):.1f} %"] if "accuracy" in runs[0] else []


def picture(result: dict, path: Path) -> None:
    """Loss on prose against seconds of training, and against the bytes kept for the backward pass, as a PNG.

    The dashed line is the base. The losses beside the bytes are those after the number of steps that most methods have,
    the larger one of equals. The seconds are those of `--cost`; methods that it did not measure are left out, and without
    any there is no picture.
    """
    points: dict[str, list[tuple[int, float]]] = {}
    tasks = {int(key.split(", ")[1]): task for key, task in result["tasks"].items() if key.startswith(f"{PICTURED}, ")}
    for steps, task in sorted(tasks.items()):
        for name, runs in best_runs(task["runs"]).items():
            points.setdefault(name, []).append((steps, mean(run["loss"] for run in runs)))
    cost = result.get("cost", {})
    shown = {name: points[SAME_LOSS.get(name, name)] for name in cost if SAME_LOSS.get(name, name) in points}
    if not shown:
        return
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(13, 4.2), sharey=True, layout="constrained")
    usual = max(tasks, key=lambda steps: (sum(steps in dict(those) for those in shown.values()), steps))
    for number, (name, those) in enumerate(shown.items()):
        style = {"marker": "osD^v<>pP*Xd"[number % 12], "label": name, "color": f"C{number % 10}"}
        steps, losses = zip(*those, strict=True)
        left.plot([count * cost[name]["seconds"] for count in steps], losses, **style)
        if usual in steps:
            right.plot(cost[name]["kept_bytes"] / MIB, losses[steps.index(usual)], linestyle="", **style)
    for axes in (left, right):
        axes.axhline(tasks[usual]["base"]["loss"], linestyle="--", color="gray", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    left.set(xlabel="seconds of training", ylabel="held-out loss, nats per token")
    right.set(xlabel="MiB kept for the backward pass", title=f"{usual} steps")
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    save_figure(figure, path)
