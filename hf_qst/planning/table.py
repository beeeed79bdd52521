"""A plan as text."""

from __future__ import annotations

_GB = 10**9


def gigabytes(size: int) -> str:
    """`0.43 GB`, `79.6 GB`; below a megabyte in bytes."""
    if size < 10**6:
        return f"{size:,} B"
    return f"{size / _GB:.3f} GB" if size < _GB else f"{size / _GB:.1f} GB"


def as_table(plan) -> str:
    """What `str(plan)` is: parameters, bytes, what fits, and what would save memory."""
    lines = [f"{plan.model}, {plan.method}: batch {plan.batch}, {plan.sequence} tokens, {plan.device}"]
    lines += _section("parameters", {name: f"{count:,}" for name, count in plan.parameters.items()})
    sizes = {name: gigabytes(size) for name, size in plan.bytes.items()}
    lines += _section("memory, where most is taken", {**sizes, "together": gigabytes(plan.total)})
    more = {}
    if plan.kept:
        more["kept at the end of the forward pass"] = gigabytes(plan.kept)
    if plan.adapter_file:
        more["adapter's file"] = gigabytes(plan.adapter_file)
    if plan.products:
        more["products"] = f"{plan.products / 1e12:.3g} TFLOP"
    if plan.seconds is not None:
        more["seconds, an estimate"] = f"{plan.seconds:.3g} (ceilings: {plan.ceilings})"
    if plan.exchanged:
        ddp, _, fsdp2 = (gigabytes(size) for size in plan.communication(8).values())
        more["received by each of 8 processes in a step"] = f"DDP {ddp}, FSDP2 {fsdp2}"
    if more:
        lines += _section("and", more)
    lines += _section("fits", {name: _fit(plan, name) for name in plan.fits})
    if plan.savings:
        lines += _section("would save", {name: gigabytes(size) for name, size in plan.savings.items()})
    return "\n".join(lines)


def _fit(plan, name: str) -> str:
    answer, largest = "yes" if plan.fits[name] else "no", plan.largest.get(name)
    if largest is None:
        return answer
    return f"{answer}; at most batch {largest['batch']}, or {largest['sequence']} tokens"


def _section(title: str, rows: dict[str, str]) -> list[str]:
    width = max(map(len, rows), default=0)
    return ["", title, *(f"  {name:<{width}}  {value}" for name, value in rows.items())]
