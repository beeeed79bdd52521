"""Time and memory of compressing a LLaMA-2-7B-shaped model, predicted from its arithmetic and from layers really done.

Operations are counted from the shapes. The rates and the time of one layer's decomposition are measured on this machine,
at real sizes. The rates of a GPU are assumptions, and marked as such.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from benchmarks.common.timing import processor_clock
from hf_qst.calibration import CrossMoment, SecondMoment
from hf_qst.mixed_rank import InputGroup, double_products, least_squares_factors, output_energies, workload

BLOCKS, HIDDEN, INNER, HEADS_OUT = 32, 4096, 11008, 32000
# Layers that share an input, with the number of layers of each: what has one statistic.
GROUPS = {
    "q, k, v": (HIDDEN, HIDDEN, 3),
    "o": (HIDDEN, HIDDEN, 1),
    "gate, up": (HIDDEN, INNER, 2),
    "down": (INNER, HIDDEN, 1),
}
# Of a GPU of the H100 or H200 kind; nothing here was measured.
ASSUMED_GPU = {
    "forward": 350e12,  # bfloat16 products of a forward pass
    "products": 35e12,  # float32 products without TF32, for the moments
    "double": 30e12,  # float64 products
    "eigh_4096": 3.0,  # seconds of one symmetric eigenproblem of 4096 in float64
}


# How the model would be compressed: calibration tokens, part kept, bytes that statistics may take at once.
_OF_WIDTH = ("factors_bytes", "hidden_states_bytes", "kept_in_a_block_bytes")
PLAN = {"tokens": 128 * 2048, "keep": 0.4, "memory_limit": 16 * 2**30}


def arithmetic(tokens: int, keep: float, memory_limit: int) -> dict:
    """Operations and bytes of each stage of a compression with these values of `PLAN`."""
    block = [InputGroup(d_in, (d_out,) * count) for d_in, d_out, count in GROUPS.values()]
    counted = workload([block] * BLOCKS, HIDDEN, tokens, keep, memory_limit)
    named = {f"{name}_bf16" if name in _OF_WIDTH else name: value for name, value in counted.items()}
    head = 2 * HEADS_OUT * HIDDEN
    return {"tokens": tokens, **named, "weights_bytes_bf16": 2 * (counted["target_weights"] + head)}


def rates(size: int = 2048, repeats: int = 3) -> dict[str, float]:
    """Operations per second of this machine's products as the compression uses them."""
    per_second = {}
    for name, dtype in (("forward", torch.float32), ("double", torch.float64)):
        one, other = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
        one @ other
        start = processor_clock()
        for _ in range(repeats):
            one @ other
        per_second[name] = 2 * size**3 * repeats / (processor_clock() - start)
    return per_second | {"products": per_second["forward"]}  # both are float32


@torch.no_grad()
def one_layer(d_in: int, d_out: int, keep: float, rows: int) -> dict:
    """Seconds of all that is done for one layer but running it: its energies, then its compensated factors.

    The weight is random and its inputs decay as a power law; the time does not depend on the values.
    """
    generator, cpu = torch.Generator().manual_seed(0), torch.device("cpu")
    scale = torch.arange(1, d_in + 1).float() ** -0.5
    inputs = torch.randn(rows, d_in, generator=generator) * scale
    weight = torch.randn(d_in, d_out, generator=generator) * d_in**-0.5
    moments = CrossMoment(d_in, cpu)
    moments.add_pair(inputs, inputs)
    chosen = int(keep * d_in * d_out / (d_in + d_out)) // 8 * 8
    seconds = {}
    steps = {
        "moment": lambda: SecondMoment(d_in, cpu).add(inputs),
        "energies": lambda: output_energies(weight, moments.second_moment()),
        "factors": lambda: least_squares_factors(weight, moments, chosen),
    }
    for name, step in steps.items():
        start = processor_clock()
        step()
        seconds[name] = processor_clock() - start
    return {"shape": [d_in, d_out], "rank": chosen, "rows": rows, "seconds": seconds}


def predict(speeds: dict[str, float], layer_seconds: dict[str, float]) -> dict:
    """Seconds of each part of the whole compression at these rates.

    Args:
        speeds: operations per second: `forward`, `products`, `double`.
        layer_seconds: of one layer's energies and compensated factors together, by group of `GROUPS`.
    """
    counted = arithmetic(**PLAN)
    parts = {
        "forward passes": counted["forward_operations"] / speeds["forward"],
        "moments": counted["moment_operations"] / speeds["products"],
        "decompositions": BLOCKS * sum(layer_seconds[name] * count for name, (_, _, count) in GROUPS.items()),
    }
    return {"parts": parts, "seconds": sum(parts.values())}


def assumed_layer_seconds() -> dict[str, float]:
    """Of a GPU: energies, factors, their balance and a solve as three eigenproblems of 4096, plus the products."""
    products = {name: double_products(d_in, d_out) for name, (d_in, d_out, _) in GROUPS.items()}
    return {name: 3 * ASSUMED_GPU["eigh_4096"] + ops / ASSUMED_GPU["double"] for name, ops in products.items()}


def measured(size: int, widths: Sequence[int], done: dict, save: Callable[[dict], None]) -> dict:
    """Layers really decomposed, this machine's rates, and what both give for the whole model.

    Layers that are in `done` already are not decomposed again; `save` is given each state.

    Args:
        size (`int`): of the square layer and of the input of the others; `HIDDEN` but in a trial.
        widths: outputs of the layers to decompose; the square one, `size`, is always among them.
    """
    result = {"layers": done.get("layers", [])}
    have = {layer["shape"][1] for layer in result["layers"]}
    for d_out in [width for width in dict.fromkeys((size, *widths)) if width not in have]:
        result["layers"].append(one_layer(size, d_out, PLAN["keep"], size))
        save(result)
    speeds = done.get("rates") or rates(min(size, 2048))
    seconds = {name: _layer_seconds(shape, result["layers"], speeds["double"]) for name, shape in GROUPS.items()}
    return result | {
        "plan": PLAN,
        "rates": speeds,
        "arithmetic": arithmetic(**PLAN),
        "here": {"layer_seconds": seconds, **predict(speeds, seconds)},
        "gpu": {
            "assumed": ASSUMED_GPU,
            "layer_seconds": assumed_layer_seconds(),
            **predict(ASSUMED_GPU, assumed_layer_seconds()),
        },
    }


def _layer_seconds(shape: tuple[int, int, int], layers: Sequence[dict], speed: float) -> float:
    """Of one layer: as measured, or as the square one, whose eigenproblems have the same size, with its own products."""
    spent = {tuple(layer["shape"]): sum(layer["seconds"][k] for k in ("energies", "factors")) for layer in layers}
    d_in, d_out, _ = shape
    square = (layers[0]["shape"][0],) * 2
    return (
        spent.get((d_in, d_out))
        or spent[square] + (double_products(d_in, d_out) - double_products(HIDDEN, HIDDEN)) / speed
    )
