"""The tables and plots of the side-tuning benchmark."""

from __future__ import annotations

from benchmarks.common.plots import pyplot, save_figure
from benchmarks.common.tables import MIB, markdown
from benchmarks.common.timing import paired_ratio


def targets(shape: str, result: dict) -> list[dict]:
    """The aims of side tuning and the figures reached: [{what, target, reached, met}]."""
    times, rows = result["times"], result["rows"]
    reached_aims = []

    def add(what: str, sense: str, target: float, reached: float | None) -> None:
        met = None if reached is None else (reached >= target if sense == ">=" else reached <= target)
        reached_aims.append({"what": what, "target": f"{sense} {target:g}", "reached": reached, "met": met})

    def saved(which: str) -> float | None:
        values = [rows.get(name, {}).get(which, {}) for name in ("qlora-ckpt", "qst")]
        return values[0]["peak"] / values[1]["peak"] if all("peak" in value for value in values) else None

    add("step time, QLoRA / QST", ">=", 2.0, paired_ratio(times, "qlora", "qst"))
    add("step time, checkpointed QLoRA / QST", ">=", 3.0, paired_ratio(times, "qlora-ckpt", "qst"))
    add("step time, QST / floor", "<=", 1.15, paired_ratio(times, "qst", "floor"))
    add("saved bytes with the loss head, checkpointed QLoRA / QST", ">=", 8.0, saved("saved_with_head"))
    add("saved bytes without the loss head, checkpointed QLoRA / QST", ">=", 2.0, saved("saved_without_head"))
    if shape == "100m":
        reached_aims = [row for row in reached_aims if "with the loss head" not in row["what"]]
    if shape == "100m-128k":
        reached_aims = [row for row in reached_aims if "saved" in row["what"]]
    if shape == "demo":  # too small for its speed to say anything about larger models
        reached_aims.clear()
    if "losses" in result:
        equal = _equal_seconds(result)
        for name, label in (("qst-r2", "the demo's QST (r=2, principal)"), ("qst", "QST as it is by default")):
            both = equal.get(name), equal.get("qlora")
            reached = both[0] / both[1] if None not in both else None
            add(f"held-out loss at equal seconds, {label} / QLoRA", "<=", 1.02, reached)
    return reached_aims


def _equal_seconds(result: dict) -> dict:
    """The losses at the seconds that QLoRA took for its steps."""
    return next((v for k, v in result["losses"]["at_equal_seconds"].items() if k.startswith("as qlora")), {})


def _mib(value: int | None) -> str:
    return "-" if value is None else f"{value / MIB:.1f}"


def table(result: dict) -> str:
    """The whole result as plain text."""
    rows, arguments = result["rows"], result["arguments"]
    on_gpu = any("device_bytes" in row for row in rows.values())
    columns = ["method", "step ms", "of floor", "tokens/s", "kept MiB", "kept MiB, no head"]
    columns += ["device MiB" if on_gpu else "peak RSS MiB", "trainable", "file MiB"]
    has_losses = "losses" in result
    if has_losses:
        columns += ["loss, steps", "loss, seconds"]
        equal = _equal_seconds(result)
    lines = []
    for name, row in rows.items():
        if "error" in row:
            lines.append([row["label"], "failed"])
            continue
        line = [
            row["label"],
            f"{row['step_seconds'] * 1e3:.0f}" if "step_seconds" in row else "-",
            f"{row['of_floor']:.2f}" if row.get("of_floor") else "-",
            f"{row['tokens_per_second']:.0f}" if "tokens_per_second" in row else "-",
            _mib(row.get("saved_with_head", {}).get("peak")),
            _mib(row.get("saved_without_head", {}).get("peak")),
            _mib(row.get("device_bytes" if on_gpu else "rss_bytes")),
            f"{row['trainable']:,}" if "trainable" in row else "-",
            _mib(row.get("file_bytes")),
        ]
        if has_losses:
            losses = result["losses"]["at_equal_steps"].get(name), equal.get(name)
            line += ["-" if loss is None else f"{loss:.4f}" for loss in losses]
        lines.append(line)
    machine = result["machine"]
    heading = (
        f"{arguments['shape']}: {result['parameters']:,} parameters, batch {arguments['batch']} x {arguments['seq']} "
        f"tokens, {machine.get('gpu') or machine['cpu']}, {machine['threads']} threads, 4-bit kernel: {result['kernel']}"
    )
    notes = [f"{row['label']} did not run: {row['error']}" for row in rows.values() if "error" in row]
    notes.append(f"medians of {arguments['repeats']} rounds (variants: half of them); memory is above the loaded base")
    if has_losses:
        losses = result["losses"]
        start, seconds = losses["start"].get("qst", float("nan")), equal.get("seconds", float("nan"))
        notes.append(
            f"loss: held-out nats per token, {start:.4f} at the start; after {losses['steps']} steps, and at the "
            f"{seconds:.0f} s QLoRA takes for them (checkpointed QLoRA: QLoRA's numbers, later)."
        )
    goals = [
        [t["what"], t["target"], "-" if t["reached"] is None else f"{t['reached']:.3f}",
         "-" if t["met"] is None else ("yes" if t["met"] else "no")]
        for t in result["targets"]
    ]  # fmt: skip
    parts = [heading, "", markdown(columns, lines), *notes]
    if goals:
        parts += ["", markdown(["to reach", "target", "reached", "met"], goals)]
    return "\n".join(parts)


def plots(result: dict, stem) -> list:
    """Draw memory bars, and the loss curves if there are any, to `<stem>_*.png`; returns the paths."""
    rows = {name: row for name, row in result["rows"].items() if "saved_with_head" in row}
    paths = []
    if rows:
        labels = [row["label"] for row in rows.values()]
        figure, axes = pyplot().subplots(figsize=(8, 0.45 * len(labels) + 1.2))
        places = range(len(labels))
        kinds = ((-0.2, "saved_with_head", "with the loss head"), (0.2, "saved_without_head", "decoder alone"))
        for offset, key, label in kinds:
            values = [row[key]["peak"] / MIB for row in rows.values()]
            bars = axes.barh([p + offset for p in places], values, height=0.38, label=label)
            axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
        axes.set_yticks(list(places), labels)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlabel("MiB kept for the backward pass (log scale)")
        axes.legend()
        paths.append(save_figure(figure, stem.with_name(f"{stem.name}_memory.png")))
    if "losses" in result:
        figure, axes = pyplot().subplots(figsize=(7, 4))
        for name, points in result["losses"]["points"].items():
            axes.plot([p[1] for p in points], [p[2] for p in points], marker=".", label=result["rows"][name]["label"])
        axes.set_xlabel("training seconds")
        axes.set_ylabel("held-out loss, nats per token")
        axes.grid(alpha=0.3)
        axes.legend()
        paths.append(save_figure(figure, stem.with_name(f"{stem.name}_loss.png")))
    return paths
