"""The tables of the compression benchmark."""

from __future__ import annotations

import math
from functools import partial
from statistics import mean, stdev

from benchmarks.common.parts import text_of
from benchmarks.common.tables import MIB, markdown, pm, verdict
from benchmarks.compression import pretrained
from benchmarks.compression.llm import RESIDUALS
from benchmarks.compression.methods import BASELINES, DEFAULT, METHODS, place
from benchmarks.compression.vit import VARIANTS, summary

# The kinds of held-out text, as columns.
KINDS = {"stdlib": "in domain", "transformers": "other Python", "prose": "English prose"}


def _label(method: str, variant: str | None = None) -> str:
    label = f"**{METHODS[method].label}**" if method == DEFAULT else METHODS[method].label
    return f"{label}, {VARIANTS[variant]}" if variant else label


def perplexities(row: dict, digits: int = 2) -> list[str]:
    return [f"{row['perplexity'][kind]:.{digits}f}" for kind in KINDS]


def llm_table(result: dict) -> str:
    dense = result["dense"]
    lines = [["1", "dense", f"{dense['parameters']:,}", *perplexities(dense)]]
    for row in sorted(result["rows"], key=place):
        lines.append([f"{row['keep']:g}", _label(row["method"]), f"{row['parameters']:,}", *perplexities(row)])
    return markdown(["keep", "method", "parameters", *KINDS.values()], lines)


def cost_table(result: dict) -> str:
    lines = [
        [_label(row["method"]), f"{row['seconds']:.1f}", f"{row['peak_bytes'] / MIB:.0f}"] for row in result["rows"]
    ]
    return markdown([f"{result['tokens']:,} tokens, keep {result['keep']:g}", "s", "peak MiB above the model"], lines)


def margin_table(result: dict) -> str:
    """The default's loss minus that of each other method on the same text, in nats, with the 95 % half width."""
    defaults = {row["keep"]: row["losses"] for row in result["rows"] if row["method"] == DEFAULT}
    lines = []
    for row in sorted(result["rows"], key=place):
        if row["method"] == DEFAULT or row["keep"] not in defaults:
            continue
        cells = []
        for kind in KINDS:
            pairs = zip(defaults[row["keep"]][kind], row["losses"][kind], strict=True)
            gaps = [ours - theirs for ours, theirs in pairs]
            width = 1.96 * stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None
            cells.append(pm((mean(gaps), width), 3))
        lines.append([f"{row['keep']:g}", METHODS[row["method"]].label, *cells])
    return markdown(["keep", "default minus", *KINDS.values()], lines)


def aims(result: dict) -> str:
    """Whether the default is below every baseline, and mixed ranks below uniform ones, at every part kept."""
    at = {(row["keep"], row["method"]): row["perplexity"]["stdlib"] for row in result["rows"]}
    lines = []
    for keep in sorted({keep for keep, _ in at}, reverse=True):
        baselines = [at[keep, name] for name in BASELINES if (keep, name) in at]
        if baselines and (keep, DEFAULT) in at:
            met = at[keep, DEFAULT] < min(baselines)
            lines.append(
                f"keep {keep:g}: default {at[keep, DEFAULT]:.2f}, best baseline {min(baselines):.2f}: {verdict(met)}"
            )
        for mixed, uniform in (("mix", "svd-llm"), (DEFAULT, "uniform-lstsq")):
            if (keep, mixed) in at and (keep, uniform) in at:
                met = at[keep, mixed] < at[keep, uniform]
                lines.append(f"keep {keep:g}: {METHODS[mixed].label} below {METHODS[uniform].label}: {verdict(met)}")
    return "\n".join(lines)


def residual_table(result: dict) -> str:
    lines = [["dense", "", *perplexities(result["dense"], 3)]]
    for row in result["rows"]:
        lines.append([RESIDUALS[row["method"]][0], f"{row['added_parameters']:,}", *perplexities(row, 3)])
    return markdown([f"residuals of rank {result['rank']}", "added", *KINDS.values()], lines)


def vit_table(result: dict) -> str:
    dense = [one["dense"] for one in result["seeds"]]
    reached = [one["accuracy"] for one in dense]
    accuracies = (
        f"{reached[0]:.2f} %" if len(set(reached)) == 1 else f"{', '.join(f'{one:.1f}' for one in reached)} % by seed"
    )
    lines = []
    for row in summary(result):
        cells = [f"{row['parameters']:,}", pm(row["accuracy"]), pm(row["drop"], 2)]
        lines.append([f"{row['keep']:g}", _label(row["method"], row["variant"]), *cells])
    table = markdown(["keep", "method", "parameters", "accuracy", "points lost"], lines)
    training = mean(one["training_accuracy"] for one in dense)
    return f"dense: {dense[0]['parameters']:,} parameters, {accuracies}, {training:.1f} % in training\n\n{table}"


def int8_table(result: dict) -> str:
    """Accuracy and megabytes on disk of the dense model and of the default's in float32 and in int8, mean over the seeds."""
    found = {"dense": [one["dense"] for one in result["seeds"]]}
    for row in sorted((row for one in result["seeds"] for row in one["rows"]), key=place):
        if row["method"] == "mix-lstsq":  # the default for images
            found.setdefault(f"keep {row['keep']:g}", []).append(row)
    lines = []
    for name, rows in found.items():
        if all("int8" in row for row in rows):
            eight = [row["int8"] for row in rows]
            sizes = [mean(row[key] for row in eight) / 1e6 for key in ("float_bytes", "bytes")]
            reached = [mean(row["accuracy"] for row in group) for group in (rows, eight)]
            lines.append([name, *(f"{size:.2f}" for size in sizes), *(f"{one:.2f}" for one in reached)])
    return (
        markdown(["model", "MB in float32", "MB in int8", "accuracy in float32", "accuracy in int8"], lines)
        if lines
        else ""
    )


def vit_aim(result: dict, keep: float = 0.4, points: float = 0.5) -> str:
    """Whether ours lose at most `points` at this part kept, in the mean over the seeds."""
    return "\n".join(
        f"keep {keep:g}, {_label(row['method'], row['variant'])}: {pm(row['drop'], 2)} points lost (aim: {points:g}): "
        f"{verdict(row['drop'][0] <= points)}"
        for row in summary(result)
        if row["method"] in ("mix-lstsq", "mix-kd") and row["keep"] == keep
    )


def layer_facts(result: dict) -> dict:
    """The worst and mean of the layers' errors against the optimum, the plain SVD and the floor."""
    rows = result["by_itself"]
    ratio = lambda one, other: [row[one] / row[other] for row in rows if row[other] > 0]
    against = {
        "calibration over its optimum": ratio("calibration", "calibration_optimum"),
        "held-out over plain SVD": ratio("held", "held_plain"),
        "held-out over its floor": ratio("held", "floor"),
    }
    return {name: {"mean": mean(values), "worst": max(values)} for name, values in against.items()}


def layer_aims(result: dict) -> str:
    """Whether every layer is within 1 % of its optimum, and none above the plain SVD on new data."""
    lines = []
    for name, facts in ((name, layer_facts(one)) for name, one in result.items()):
        near, below = facts["calibration over its optimum"]["worst"], facts["held-out over plain SVD"]["worst"]
        lines.append(
            f"{name}: within 1 % of the optimum: {verdict(near <= 1.01)}; never above plain SVD: {verdict(below <= 1)}"
        )
    return "\n".join(lines)


def layer_table(result: dict) -> str:
    lines = []
    for name, facts in ((name, layer_facts(one)) for name, one in result.items()):
        lines += [[f"{name}: {what}", f"{fact['mean']:.4f}", f"{fact['worst']:.4f}"] for what, fact in facts.items()]
    return markdown(["error of a layer by itself", "mean of layers", "worst layer"], lines)


def stream_table(result: dict) -> str:
    lines = []
    for name, one in result.items():
        for method, errors in one["in_the_model"].items():
            values = list(errors.values())
            lines.append([f"{name}: {METHODS[method].label}", f"{mean(values):.4f}", f"{max(values):.4f}"])
    return markdown(["error of a layer in the compressed model", "mean of layers", "worst layer"], lines)


def speed_table(result: dict) -> str:
    parts = [one["part"] for one in result["layers"][0]["factors"]]
    lines = []
    for row in result["layers"]:
        even = "never slower" if row["break_even"] is None else f"{row['break_even']:.2f}"
        shape = f"{row['shape'][0]} x {row['shape'][1]}, {row['rows']} row{'s' * (row['rows'] > 1)}"
        lines.append(
            [shape, f"{row['dense_seconds'] * 1e3:.2f}", *(f"{one['of_dense']:.2f}" for one in row["factors"]), even]
        )
    columns = ["layer", "dense ms", *(f"{part:g}" for part in parts), "equal at"]
    return markdown(columns, lines)


def model_table(result: dict) -> str:
    lines = []
    for name in (name for name in ("base", "100m") if name in result):
        for row in result[name]:
            kept = "dense" if row["model"] == "dense" else f"keep {row['model']}"
            cells = [f"{row[f'{k}_tokens_per_second']:.0f}" for k in ("prefill", "decode")]
            cells += [f"{row[f'{k}_speedup']:.2f}" for k in ("prefill", "decode")]
            lines.append([f"{name}, {kept}", *cells])
    return markdown(["model", "prefill tokens/s", "decode tokens/s", "prefill / dense", "decode / dense"], lines)


def large_table(result: dict) -> str:
    counted = result["arithmetic"]
    lines = [
        f"{counted['target_weights']:,} weights in {counted['eigenproblems']} layers, {counted['tokens']:,} tokens, "
        f"{counted['forward_passes']:.1f} forward passes",
        f"operations: forward {counted['forward_operations']:.3g}, moments {counted['moment_operations']:.3g}, "
        f"float64 products {counted['double_operations']:.3g}",
        f"bytes: weights {counted['weights_bytes_bf16'] / 2**30:.1f} GiB in bfloat16, factors "
        f"{counted['factors_bytes_bf16'] / 2**30:.1f}, hidden states {counted['hidden_states_bytes_bf16'] / 2**30:.1f}, kept in a block "
        f"{counted['kept_in_a_block_bytes_bf16'] / 2**30:.1f}, "
        f"moments at a time {counted['moments_bytes'] / 2**30:.1f}, largest layer in work "
        f"{counted['largest_layer_bytes'] / 2**30:.1f}",
    ]
    for layer in result["layers"]:
        spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in layer["seconds"].items())
        lines.append(f"{layer['shape'][0]} x {layer['shape'][1]} at rank {layer['rank']}, done here: {spent}")
    columns = ["whole model", *result["here"]["parts"], "all"]
    table = []
    for name, label in (("here", "this machine, its own rates"), ("gpu", "a GPU, rates assumed")):
        times = [*result[name]["parts"].values(), result[name]["seconds"]]
        table.append([label, *(f"{seconds / 60:.1f} min" for seconds in times)])
    return "\n".join(lines) + "\n\n" + markdown(columns, table)


def pretrained_table(result: dict) -> str:
    if "dense" not in result:
        return ""
    shapes = result["dense"]["shapes"]
    dense_bits = pretrained.block_bits(shapes, {})
    cells = lambda row: (
        [f"{row['perplexity'][k]:.2f}" for k in ("code", "prose")]
        + [f"{100 * row['cloze'][k]:.1f}" for k in ("code", "prose")]
    )
    size = lambda bits: f"{bits / 8 / 1e6:.0f}"
    lines = [["1", "dense", "", size(dense_bits), *cells(result["dense"])]]
    if "nf4" in result:
        bits = dense_bits / pretrained.STORED_BITS * pretrained.NF4_BITS
        lines.append(["1", pretrained.LABELS["nf4"], "", size(bits), *cells(result["nf4"])])
    place = lambda row: (row["recovery"], -row["keep"], [*pretrained.WHOLE, *pretrained.ROWS].index(row["method"]))
    for row in sorted(result["rows"], key=place):
        label = pretrained.LABELS[row["method"]]
        label = f"**{label}**" if row["method"] == DEFAULT else label
        steps = str(row["recovery"]) if row["recovery"] else ""
        lines.append([f"{row['keep']:g}", label, steps, size(8 * row["block_bytes"]), *cells(row)])
    columns = ["keep", "method", "LoRA steps", "MB of the blocks", "code", "prose", "cloze % code", "cloze % prose"]
    return markdown(columns, lines)


def pretrained_aims(result: dict) -> str:
    """Whether the best of ours is below every peer at every part kept, on both kinds of text."""
    lines = []
    for keep, steps in sorted(
        {(row["keep"], row["recovery"]) for row in result.get("rows", [])}, key=lambda at: (at[1], -at[0])
    ):
        rows = {
            row["method"]: row["perplexity"]
            for row in result["rows"]
            if (row["keep"], row["recovery"]) == (keep, steps)
        }
        peers = [values for method, values in rows.items() if method not in pretrained.OURS]
        if DEFAULT in rows and peers:
            best = {kind: min(values[kind] for values in peers) for kind in ("code", "prose")}
            met = all(rows[DEFAULT][kind] < best[kind] for kind in best)
            after = f" after {steps} steps" if steps else ""
            text = ", ".join(f"{kind} {rows[DEFAULT][kind]:.2f} against {best[kind]:.2f}" for kind in best)
            lines.append(f"keep {keep:g}{after}: {text}: {verdict(met)}")
    return "\n".join(lines)


def pretrained_speed(result: dict) -> str:
    lines = []
    for row in result.get("speed", []):
        cells = [f"{row[f'{k}_tokens_per_second']:.0f}" for k in ("prefill", "decode")]
        lines.append([row["model"], *cells, *(f"{row[f'{k}_speedup']:.2f}" for k in ("prefill", "decode"))])
    columns = ["model", "prefill tokens/s", "decode tokens/s", "prefill / dense", "decode / dense"]
    return markdown(columns, lines) if lines else ""


def pretrained_cost(result: dict) -> str:
    return cost_table(result["cost"]) if "cost" in result else ""


TABLES = {
    "llm": [llm_table, margin_table, aims],
    "cost": [cost_table],
    "residual": [residual_table],
    "vit": [vit_table, int8_table, vit_aim],
    "layers": [layer_table, layer_aims, stream_table],
    "speed": [speed_table, model_table],
    "7b": [large_table],
    "pretrained": [pretrained_table, pretrained_aims, pretrained_cost, pretrained_speed],
}
report = partial(text_of, TABLES)
