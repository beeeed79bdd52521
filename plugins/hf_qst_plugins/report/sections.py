"""The sections of the page. Each takes the record and the list of plots, and gives HTML, or nothing where it has no data."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html import escape

from .tables import shown, table

MOST_ROWS = 1000
"""A table shows so many rows; the record has all of them."""
_BLOCK = re.compile(r"\.(\d+)\.")


def _chart(charts: list[dict], kind: str, title: str, **content) -> str:
    charts.append({"kind": kind, "title": title, **content})
    return f'<figure><figcaption>{escape(title)}</figcaption><div class="chart" data-chart="{len(charts) - 1}"></div></figure>'


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def _measured(record: dict) -> dict[str, dict]:
    """What was measured of the model, by column: before and after, or the one model there was."""
    if "after" in record:
        return {"before": record["before"], "after": record["after"]}
    return {"model": record["before"]} if "before" in record else {}


def figures(record: dict, charts: list[dict]) -> str:
    """Size, perplexity and speed."""
    columns = _measured(record)
    if not columns:
        return ""
    rows = [
        ["parameters", *(m["parameters"] for m in columns.values())],
        ["bytes", *(m["bytes"] for m in columns.values())],
    ]
    texts = {"in_domain": "the data's kind", "other": "other text"}
    for name, text in texts.items():
        for key in ("perplexity", "loss", "tokens_per_second"):
            values = [m["perplexity"].get(name, {}).get(key) for m in columns.values()]
            if any(value is not None for value in values):
                rows.append([f"{key.replace('_', ' ')}, {text}", *values])
    if len(columns) == 2:
        rows = [[*row, _ratio(row[1], row[2])] for row in rows]
    head = ["", *columns, *(["after / before"] if len(columns) == 2 else [])]
    classes = " and ".join(dict.fromkeys(m["class"] for m in columns.values()))
    note = "<p>Losses are in nats per token; tokens per second are of scoring that text.</p>" if len(rows) > 2 else ""
    return _section("Figures", f"<p>{escape(classes)}</p>", table(head, rows, "figures"), note)


def _ratio(before: object, after: object) -> float | None:
    numbers = isinstance(before, (int, float)) and isinstance(after, (int, float)) and before
    return after / before if numbers else None


def training(record: dict, charts: list[dict]) -> str:
    """Loss curves, and what the training took."""
    found = record.get("training")
    if not found:
        return ""
    log, parts = found["log"], []
    lines = [("training loss", "loss"), ("held-out loss", "eval_loss")]
    series = [{"name": name, "points": [[row["step"], row[key]] for row in log if key in row]} for name, key in lines]
    start = record["before"]["perplexity"].get("in_domain")
    last = max((row["step"] for row in log), default=0)
    if start and log:
        series.append({"name": "the base alone, held out", "points": [[0, start["loss"]], [last, start["loss"]]]})
    end = record["after"]["perplexity"].get("in_domain")
    if end and log:
        series.append({"name": "at the end, held out", "points": [[last, end["loss"]]]})
    series = [one for one in series if one["points"]]
    if log:
        parts.append(_chart(charts, "lines", "Loss (nats per token) by step", series=series, x="step", y="loss"))
    kept = [
        {"name": name, "points": [[row["step"], row[key]] for row in log if key in row]}
        for name, key in (("of sampled channels", "kept_ratio"), ("above the threshold", "kept_ratio_threshold"))
    ]
    if kept[0]["points"]:
        parts.append(
            _chart(charts, "lines", "Kept part of the blocks' weights by step", series=kept, x="step", y="kept part")
        )
    rows = [
        [name.replace("_", " "), found[name]] for name in ("steps", "seconds", "trainable_parameters", "resumed_from")
    ]
    if "choice" in record:
        rows.append(["choice", record["choice"]])
    return _section("Training", *parts, table(["", ""], rows, "training"))


def layers(record: dict, charts: list[dict]) -> str:
    """Parameters and bytes by layer."""
    columns = _measured(record)
    if not columns:
        return ""
    names = list(dict.fromkeys(row["name"] for m in columns.values() for row in m["layers"]))
    by_name = {when: {row["name"]: row for row in m["layers"]} for when, m in columns.items()}

    def value(when: str, name: str, key: str):
        return by_name[when].get(name, {}).get(key)

    series = [{"name": when, "values": [value(when, name, "bytes") or 0 for name in names]} for when in columns]
    chart = _chart(charts, "bars", "Bytes by layer", categories=names, series=series, y="bytes")
    head = ["layer", *(f"{key} {when}" for key in ("parameters", "bytes") for when in columns)]
    rows = [[name, *(value(when, name, key) for key in ("parameters", "bytes") for when in columns)] for name in names]
    return _section("Layers", chart, _details("All layers", head, rows, "layers"))


def linear_layers(record: dict, charts: list[dict]) -> str:
    """Widths and ranks by block, where a method changed them."""
    if "after" not in record:
        return ""
    before = {row["name"]: row for row in record["before"]["linear_layers"]}
    after = record["after"]["linear_layers"]
    changed = [row for row in after if row["name"] in before and _differs(before[row["name"]], row)]
    if not changed:
        return ""
    parts = []
    for title, value in (
        ("Rank", lambda row: row["rank"]),
        ("Inputs", lambda row: row["shape"][0]),
        ("Outputs", lambda row: row["shape"][1]),
    ):
        series = _by_block(changed, before, value)
        if title == "Rank" or any(len({point[1] for point in one["points"]}) > 1 for one in series):
            series = [one for one in series if one["points"]]
            if series:
                parts.append(
                    _chart(
                        charts,
                        "lines",
                        f"{title} of the linear layers by block",
                        series=series,
                        x="block",
                        y=title.lower(),
                    )
                )
    head = [
        "layer",
        "inputs before",
        "outputs before",
        "inputs",
        "outputs",
        "rank",
        "parameters before",
        "parameters",
        "bytes",
    ]
    rows = [
        [
            r["name"],
            *before[r["name"]]["shape"],
            *r["shape"],
            r["rank"],
            before[r["name"]]["parameters"],
            r["parameters"],
            r["bytes"],
        ]
        for r in changed
    ]
    return _section("Widths and ranks", *parts, _details("All changed linear layers", head, rows, "linear"))


def _differs(before: dict, after: dict) -> bool:
    return before["shape"] != after["shape"] or before["rank"] != after["rank"]


def _by_block(rows: list[dict], before: dict, value: Callable[[dict], int | None]) -> list[dict]:
    """A line for each kind of layer: the value by number of block; layers without a value are left out."""
    lines: dict[str, list] = {}
    for row in rows:
        found = _BLOCK.search(row["name"])
        if found and value(row) is not None:
            lines.setdefault(row["name"][found.end() :], []).append([int(found.group(1)), value(row)])
    return [{"name": name, "points": points} for name, points in lines.items()]


def completions(record: dict, charts: list[dict]) -> str:
    """Completions before and after; hot tokens are marked."""
    columns = _measured(record)
    if not any(m["completions"] for m in columns.values()):
        return ""
    cards, hot = [], False
    for rows in zip(*(m["completions"] for m in columns.values()), strict=True):
        for when, row in zip(columns, rows, strict=True):
            hot = hot or "temperatures" in row
            speed = f"{shown(row['tokens'])} tokens, {shown(row['tokens_per_second'])} a second"
            cards.append(
                f'<div class="card"><h3>{escape(when)} <small>{speed}</small></h3>'
                f'<pre><span class="prompt">{escape(row["prompt"])}</span>{_completion(row)}</pre></div>'
            )
    note = "<p>Tokens that were drawn at the higher temperature are <mark>marked</mark>.</p>" if hot else ""
    return _section("Completions", note, f'<div class="cards">{"".join(cards)}</div>')


def _completion(row: dict) -> str:
    if "temperatures" not in row:
        return escape(row["text"])
    coldest = min(row["temperatures"], default=0.0)
    return "".join(
        f'<mark title="temperature {shown(t)}">{escape(piece)}</mark>' if t > coldest else escape(piece)
        for piece, t in zip(row["pieces"], row["temperatures"], strict=True)
    )


def code(record: dict, charts: list[dict]) -> str:
    """pass@k and outcomes of an evaluation of code."""
    found = record.get("code")
    if not found:
        return ""
    rows = [[f"pass@{k}", rate] for k, rate in found["pass_at_k"].items()]
    rows += [
        [name.replace("_", " "), found[name]]
        for name in ("tasks", "samples", "parse_rate", "distinct", "tokens", "seconds")
    ]
    outcomes = {name: count for name, count in found["outcomes"].items() if count}
    series = [{"name": "samples", "values": list(outcomes.values())}]
    chart = _chart(charts, "bars", "Samples by outcome", categories=list(outcomes), series=series, y="samples")
    tasks = [[task, found["passed"][task], drawn] for task, drawn in found["drawn"].items()]
    return _section(
        "Code problems",
        table(["", ""], rows, "code"),
        chart,
        _details("All problems", ["problem", "passed", "samples"], tasks, "problems"),
    )


def tasks(record: dict, charts: list[dict]) -> str:
    """Metrics of lm-evaluation-harness."""
    found = record.get("tasks")
    if not found:
        return ""
    rows = [[task, metric, value] for task, metrics in found.items() for metric, value in metrics.items()]
    return _section("Tasks", table(["task", "metric", "value"], rows, "tasks"))


def speed(record: dict, charts: list[dict]) -> str:
    """Tokens per second of reading and writing."""
    found = record.get("speed")
    if not found:
        return ""
    rows = [[name, f["tokens_per_second"], min(f["seconds"]), max(f["seconds"])] for name, f in found.items()]
    head = ["", "tokens per second, median", "seconds, least", "seconds, most"]
    return _section("Speed", table(head, rows, "speed"))


def plan(record: dict, charts: list[dict]) -> str:
    """What a run will take."""
    found = record.get("plan")
    if not found:
        return ""
    chart = _chart(
        charts,
        "bars",
        "Bytes at the moment that takes most",
        categories=list(found["bytes"]),
        series=[{"name": "bytes", "values": list(found["bytes"].values())}],
        y="bytes",
    )
    rows = [[f"parameters, {name}", count] for name, count in found["parameters"].items()]
    rows += [[f"bytes, {name}", size] for name, size in found["bytes"].items()]
    rows += [["bytes, together", found["total"]], ["seconds, an estimate", found["seconds"]]]
    fits = [[f"fits {name}", "yes" if fits else "no"] for name, fits in found["fits"].items()]
    return _section("Plan", chart, table(["", ""], rows + fits, "plan"))


def cache(record: dict, charts: list[dict]) -> str:
    """What filling a hidden-state cache took."""
    return _named(record, "cache", "Stored hidden states")


def export(record: dict, charts: list[dict]) -> str:
    """What was written for other tools."""
    return _named(record, "export", "Export")


def _named(record: dict, key: str, title: str) -> str:
    found = record.get(key)
    if not found:
        return ""
    rows = [[k.replace("_", " "), ", ".join(v) if isinstance(v, list) else v] for k, v in found.items()]
    return _section(title, table(["", ""], rows, key))


def options(record: dict, charts: list[dict]) -> str:
    """Every option, and the files that were written."""
    rows = [
        [name, v if isinstance(v, str) else json.dumps(v)] for name, v in record["options"].items() if v is not None
    ]
    parts = [_details("All options", ["option", "value"], rows, "options")]
    if "files" in record:
        parts.append(
            _details("Files", ["file", "bytes"], [[name, size] for name, size in record["files"].items()], "files")
        )
    return _section("What was asked for", *parts)


def _details(title: str, head: list[str], rows: list[list], name: str) -> str:
    left_out = f"<p>The first {MOST_ROWS} of {len(rows):,}; the record has all.</p>" if len(rows) > MOST_ROWS else ""
    return f"<details><summary>{escape(title)}</summary>{left_out}{table(head, rows[:MOST_ROWS], name)}</details>"


SECTIONS: tuple[Callable[[dict, list[dict]], str], ...] = (
    figures,
    training,
    linear_layers,
    layers,
    speed,
    plan,
    cache,
    export,
    code,
    tasks,
    completions,
    options,
)
