"""Speed in the compression benchmark: two narrow products against a wide one, and whole models before and after."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch
from torch import nn
from tqdm.auto import tqdm

from benchmarks.common.timing import in_turns, paired_ratio, processor_clock
from benchmarks.compression.methods import target_shapes
from hf_qst.base_model import dense_shape
from hf_qst.mixed_rank import LowRankLinear

LAYERS = ((768, 768), (768, 2048), (2048, 2048), (4096, 4096), (4096, 11008))
ROWS = (1, 16, 128, 512)
PARTS = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0)


def clock_of(device: torch.device) -> Callable[[], float]:
    return processor_clock if device.type == "cpu" else time.perf_counter


def random_factors(dense: nn.Linear, rank: int) -> LowRankLinear:
    """Factors of this rank; their values do not change what they cost."""
    layer = LowRankLinear(*dense_shape(dense), rank, dense.bias is not None, device=dense.weight.device)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    return layer.to(dense.weight.dtype).requires_grad_(False)


@torch.no_grad()
def layers(
    repeats: int,
    device: torch.device,
    shapes: Sequence[tuple[int, int]] = LAYERS,
    rows: Sequence[int] = ROWS,
    parts: Sequence[float] = PARTS,
) -> list[dict]:
    """Seconds of a dense layer, and of factors at parts of the rank at which they are as large as it."""
    layer_rows = []
    for d_in, d_out in tqdm(shapes, desc="layers", unit="shape"):
        dense = nn.Linear(d_in, d_out, bias=False, device=device).requires_grad_(False)
        ranks = {part: max(8, int(part * d_in * d_out / (d_in + d_out)) // 8 * 8) for part in parts}
        made = {part: random_factors(dense, rank) for part, rank in ranks.items()}
        for count in rows:
            inputs = torch.randn(count, d_in, device=device)
            calls = {"dense": lambda dense=dense, inputs=inputs: dense(inputs)}
            calls |= {str(part): lambda layer=layer, inputs=inputs: layer(inputs) for part, layer in made.items()}
            # A call takes microseconds where rows are few.
            often = max(repeats, min(50, int(2e9 / (d_in * d_out * count))))
            times = in_turns(calls, often, device, clock=clock_of(device))
            against = [(part, paired_ratio(times, str(part), "dense")) for part in parts]
            layer_rows.append(
                {
                    "shape": [d_in, d_out],
                    "rows": count,
                    "dense_seconds": median(times["dense"]),
                    "factors": [{"part": part, "rank": ranks[part], "of_dense": value} for part, value in against],
                    "break_even": break_even(against),
                }
            )
    return layer_rows


def break_even(ratios: Sequence[tuple[float, float]]) -> float | None:
    """The part kept at which factors first take as long as the dense layer, on the line between two measured ones.

    None where they are faster at every part measured.
    """
    before = (0.0, 0.0)
    for part, value in ratios:
        if value >= 1:
            return before[0] + (part - before[0]) * (1 - before[1]) / (value - before[1])
        before = (part, value)
    return None


def with_ranks(model: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
    """A copy of a model whose named layers have random factors of these ranks; it gives nonsense at the real speed."""
    small = copy.deepcopy(model)
    for name, rank in ranks.items():
        small.set_submodule(name, random_factors(model.get_submodule(name), rank))
    return small


def uniform_ranks(model: nn.Module, keep: float) -> dict[str, int]:
    """The same part of the break-even rank for every layer in the blocks."""
    return {name: max(1, int(keep * a * b / (a + b))) for name, (a, b) in target_shapes(model).items()}


@torch.no_grad()
def models(
    made: Mapping[str, nn.Module], prompt: int, new: int, repeats: int, vocabulary: int, device: torch.device, **reading
) -> list[dict]:
    """Tokens per second of each model, of a prompt read at once and of tokens written one by one; one sequence.

    Args:
        made: models by name, "dense" among them.
        reading: more arguments of the forward that reads the prompt.
    """
    ids = torch.randint(vocabulary, (1, prompt), generator=torch.Generator().manual_seed(0)).to(device)

    start = {"input_ids": ids[:, :8], "attention_mask": torch.ones_like(ids[:, :8]), "pad_token_id": 0}
    length = {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False}
    reads = {name: lambda model=model: model(input_ids=ids, use_cache=False, **reading) for name, model in made.items()}
    writes = {name: lambda model=model: model.generate(**start, **length) for name, model in made.items()}
    times = {
        kind: (in_turns(calls, repeats, device, clock=clock_of(device)), count)
        for kind, calls, count in (("prefill", reads, prompt), ("decode", writes, new))
    }
    return [
        {"model": name}
        | {f"{kind}_tokens_per_second": count / median(seconds[name]) for kind, (seconds, count) in times.items()}
        | {f"{kind}_speedup": paired_ratio(seconds, "dense", name) for kind, (seconds, _) in times.items()}
        for name in made
    ]
