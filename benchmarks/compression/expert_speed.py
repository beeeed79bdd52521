"""How fast the experts of a compressed layer run: one after the other, or all in one batched product for each factor.

The batched forms read copies of all factors, stacked and padded with zeros to the layer's largest rank, which are made
before the clock starts. `grouped` multiplies the tokens, sorted by expert, in one `grouped_mm`; `padded` pads every expert's
tokens to the busiest one's as well, for `bmm`; `gathered` copies its expert's factors for each token.

    python -m benchmarks.compression.expert_speed                  # on the CPU
    python -m benchmarks.compression.expert_speed --device cuda --dtype bfloat16
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig

from benchmarks.common.command_line import parser_of, require_device, require_positive
from benchmarks.common.measure import RESULTS, environment, write_json
from benchmarks.common.tables import markdown
from benchmarks.common.timing import in_turns, processor_clock
from hf_qst.mixed_rank import LowRankLinear
from hf_qst.reshaped_models import split_experts

RESULT = RESULTS / "compression_expert_speed.json"
TOKENS = (1, 8, 64, 512)
Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Hidden states [tokens, hidden], experts [tokens, k] and their weights [tokens, k]."""


def compressed(hidden: int, middle: int, count: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A layer of experts with random factors; ranks differ by expert and are multiples of 8, from 3/32 to 5/16 of `hidden`."""
    config = MixtralConfig(
        hidden_size=hidden, intermediate_size=middle, num_local_experts=count, num_hidden_layers=1, vocab_size=8
    )
    with torch.device("meta"):
        experts = split_experts(AutoModelForCausalLM.from_config(config)).model.layers[0].mlp.experts
    least, most = 3 * hidden // 256, 5 * hidden // 128
    for index in range(count):
        for name in experts.names:
            dense = experts[index].get_submodule(name)
            rank = 8 * int(torch.randint(least, most + 1, ()))
            layer = LowRankLinear(dense.in_features, dense.out_features, rank, bias=False, device=device, dtype=dtype)
            for weight in layer.parameters():
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
            setattr(experts[index], name, layer)
    return experts.requires_grad_(False)


def stacked(experts: nn.Module) -> list[torch.Tensor]:
    """The factors of all experts in the order in which they run, each [experts, d_in, d_out], padded to the largest rank."""
    factors = []
    for name in experts.names:
        layers = [experts[index].get_submodule(name) for index in range(len(experts))]
        rank = max(layer.rank for layer in layers)
        down = [nn.functional.pad(layer.down.weight, (0, 0, 0, rank - layer.rank)) for layer in layers]
        up = [nn.functional.pad(layer.up.weight, (0, rank - layer.rank)) for layer in layers]
        factors += [torch.stack(down).mT, torch.stack(up).mT]
    return factors


def _through(factors: list[torch.Tensor], rows: torch.Tensor, multiply: Callable) -> torch.Tensor:
    """Rows through the four factors and Mixtral's gate; `multiply(rows, factor)` is one batched product."""
    gate, up = multiply(multiply(rows, factors[0]), factors[1]).chunk(2, dim=-1)
    return multiply(multiply(nn.functional.silu(gate) * up, factors[2]), factors[3])


def _weighed(rows: torch.Tensor, order: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Rows [tokens * k, d] sorted by expert, times their weights, back in order and summed: [tokens, d]."""
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return (rows * weights.flatten()[order, None])[back].unflatten(0, weights.shape).sum(1)


def grouped(factors: list[torch.Tensor], hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor):
    order = index.flatten().argsort(stable=True)
    ends = index.flatten().bincount(minlength=len(factors[0])).cumsum(0).int()
    product = lambda rows, factor: nn.functional.grouped_mm(rows, factor, offs=ends)
    return _weighed(_through(factors, hidden[order // index.shape[-1]], product), order, weights)


def padded(factors: list[torch.Tensor], hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor):
    chosen = index.flatten()
    order, counts = chosen.argsort(stable=True), chosen.bincount(minlength=len(factors[0]))
    place = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[chosen[order]]
    rows = hidden.new_zeros(len(counts), int(counts.max()), hidden.shape[-1])
    rows[chosen[order], place] = hidden[order // index.shape[-1]]
    return _weighed(_through(factors, rows, torch.bmm)[chosen[order], place], order, weights)


def gathered(factors: list[torch.Tensor], hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor):
    chosen = index.flatten()
    product = lambda rows, factor: torch.bmm(rows[:, None], factor[chosen])[:, 0]
    rows = _through(factors, hidden.repeat_interleave(index.shape[-1], 0), product)
    return (rows * weights.flatten()[:, None]).unflatten(0, weights.shape).sum(1)


BATCHED: dict[str, Callable] = {"grouped": grouped, "padded": padded, "gathered": gathered}
_FEW = 8
"""Tokens up to which `gathered` runs: each copies its experts' factors."""


def routed(tokens: int, experts: nn.Module, top_k: int, device: torch.device, dtype: torch.dtype) -> Routed:
    """Random tokens, each sent to `top_k` experts."""
    hidden = torch.randn(tokens, experts.in_features, device=device, dtype=dtype)
    weights, index = torch.randn(tokens, len(experts), device=device).softmax(-1).topk(top_k)
    return hidden, index, weights.to(dtype)


@torch.inference_mode()
def measure(experts: nn.Module, given: Routed, rounds: int) -> dict[str, dict[str, float]]:
    """For each form the median milliseconds, and the largest difference from `one by one` in parts of its largest output."""
    factors, calls = stacked(experts), {"one by one": lambda: experts(*given)}
    for name, form in BATCHED.items():
        if form is not gathered or len(given[0]) <= _FEW:
            calls[name] = lambda form=form: form(factors, *given)
    expected = calls["one by one"]()
    errors = {name: ((call() - expected).abs().max() / expected.abs().max()).item() for name, call in calls.items()}
    device = given[0].device
    times = in_turns(calls, rounds, device, clock=processor_clock if device.type == "cpu" else time.perf_counter)
    return {name: {"ms": 1e3 * median(times[name]), "error": errors[name]} for name in calls}


def table(rows: dict[str, dict]) -> str:
    forms = ["one by one", *BATCHED]
    cell = lambda found: f"{found['ms']:.2f}" if found else ""
    lines = [[tokens, *(cell(found.get(name)) for name in forms)] for tokens, found in rows.items()]
    return markdown(["tokens", *(f"{name}, ms" for name in forms)], lines)


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of("benchmarks.compression.expert_speed", __doc__)
    sizes = {"hidden": 1024, "middle": 768, "experts": 32, "top_k": 4, "rounds": 9}
    for name, value in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--output", type=Path, default=RESULT, help="JSON file of the results")
    options = parser.parse_args(arguments)
    require_positive(parser, options, sizes)
    require_device(parser, options)
    torch.manual_seed(0)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    experts = compressed(options.hidden, options.middle, options.experts, device, dtype)
    rows = {
        str(tokens): measure(experts, routed(tokens, experts, options.top_k, device, dtype), options.rounds)
        for tokens in options.tokens
    }
    layer = {name: getattr(options, name) for name in sizes} | {"dtype": options.dtype}
    write_json(options.output, {"environment": environment(device), "layer": layer, "tokens": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
