"""The aims of the kernels, and whether the rows of a GPU reach them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from benchmarks.common.tables import markdown
from benchmarks.kernels.reads import POOL, READINGS

# An op's default way may not be slower than the library's by more than this: the spread of a measurement.
NOISE = 1.05
SHAPE = ("op", "model", "rows", "workload", "dtype")


def _times(rows: Sequence[dict], op: str, field: str = "us") -> dict[tuple, dict[str, float]]:
    """Shape -> variant -> time (or bytes) of an op's rows that have one."""
    found: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if row["op"] == op and row.get(field) is not None:
            found.setdefault(tuple(row[name] for name in SHAPE), {})[row["variant"]] = row[field]
    return found


def _aim(name: str, what: str, ratios: dict[tuple, float], limit: float, why_none: str) -> dict:
    """An aim is met where every shape keeps to it; `met` is None where nothing was measured."""
    if not ratios:
        return {"aim": name, "what": what, "met": None, "detail": f"no rows: {why_none}", "shapes": 0}
    fine = [r <= limit for r in ratios.values()]
    worst, best = max(ratios, key=ratios.get), min(ratios.values())
    detail = (
        f"{sum(fine)} of {len(fine)} shapes; best {best:.2f}, median {median(ratios.values()):.2f}, worst "
        f"{ratios[worst]:.2f} ({', '.join(map(str, worst[1:4]))})"
    )
    return {"aim": name, "what": what, "met": all(fine), "detail": detail, "shapes": len(fine)}


def _ratios(times: dict[tuple, dict[str, float]], ours: str, theirs: str) -> dict[tuple, float]:
    return {shape: t[ours] / t[theirs] for shape, t in times.items() if ours in t and theirs in t}


def aims(rows: Sequence[dict], missing: dict[str, str] | None = None) -> list[dict]:
    """
    Each aim with `met` (True, False, or None where there are no rows) and the figures behind it.

    Args:
        rows: of `benchmarks.kernels.rows.measure_all` on a GPU.
        missing: packages that are not installed, as the report has them.
    """
    missing = missing or {}
    without = lambda package, else_: f"{package} was not installed" if package in missing else else_
    head, peaks = _times(rows, "linear_cross_entropy"), _times(rows, "linear_cross_entropy", "peak_bytes")
    none = without("liger_kernel", "no time of both")
    found = [
        _aim("1 memory", "peak memory <= Liger's", _ratios(peaks, "auto", "Liger"), 1.0, none),
        _aim("1 time", "time <= 1.05 x Liger's", _ratios(head, "auto", "Liger"), 1.05, none),
    ]

    reads = {}
    for (_, model, count, _, dtype), t in _times(rows, "read once").items():
        reads[model, count, dtype] = min(reads.get((model, count, dtype), float("inf")), t["library"])
    taps = {}
    for shape, t in {**_times(rows, "tap forward"), **_times(rows, "tap pooling")}.items():
        read, ours = reads.get((shape[1], shape[2], shape[4])), t.get("auto", t.get(POOL, t.get("library")))
        if read and ours:
            taps[shape] = ours / read
    for name, those in (
        ("rank 16, full", lambda s: s[0] == "tap forward" and s[3] == "to 16, full"),
        ("rank 16, int8", lambda s: s[0] == "tap forward" and s[3] == "to 16, int8"),
        ("dim / 16, full", lambda s: s[0] == "tap forward" and s[3].endswith("full") and s[3] != "to 16, full"),
        ("dim / 16, int8", lambda s: s[0] == "tap forward" and s[3].endswith("int8") and s[3] != "to 16, int8"),
        ("pooling", lambda s: s[0] == "tap pooling"),
    ):
        chosen = {shape: ratio for shape, ratio in taps.items() if those(shape)}
        what = "tap <= 1.2 x reading the hidden state once"
        found.append(_aim(f"2 {name}", what, chosen, 1.2, "no time of both"))

    for name, op, limit in (("3 K1", "norm_index_select", 0.75), ("3 K3", "linear_index_add", 0.8)):
        times = {}
        for shape, t in _times(rows, op).items():
            pairs = [us for variant, us in t.items() if variant in ("library", "F.linear + index_add_")]
            if pairs and "triton" in t:
                times[shape] = t["triton"] / min(pairs)
        found.append(_aim(name, f"{op} <= {limit} x the unfused pair", times, limit, without("triton", "no time")))

    for op in _ops(rows):
        chosen = _ratios(_times(rows, op), "auto", "library")
        if chosen:
            what = f"{op} never slower than the library where chosen"
            found.append(_aim(f"default {op}", what, chosen, NOISE, ""))
    return found


def _ops(rows: Sequence[dict]) -> list[str]:
    """Names of the ops that there are rows of."""
    readings = {reading.name for reading in READINGS}
    return [op for op in dict.fromkeys(row["op"] for row in rows) if op not in readings]


def never_wins(rows: Sequence[dict]) -> list[str]:
    """Ops whose Triton kernels were measured and beat the strongest other way at no shape: to be deleted."""
    found = []
    for op in _ops(rows):
        shapes = [t for t in _times(rows, op).values() if "triton" in t and len(t.keys() - {"triton", "auto"})]
        wins = [t for t in shapes if t["triton"] < min(us for v, us in t.items() if v not in ("triton", "auto"))]
        if shapes and not wins:
            found.append(op)
    return found


def table(found: Sequence[dict]) -> str:
    """In Markdown."""
    words = {True: "yes", False: "no", None: "not measured"}
    lines = [[aim["aim"], aim["what"], words[aim["met"]], aim["detail"]] for aim in found]
    return markdown(["aim", "what", "met", "measured"], lines, text=4)
