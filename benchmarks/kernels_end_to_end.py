"""What the kernels change in whole models: a side-tuning step, and decoding of pruned, 4-bit and low-rank models.

    python -m benchmarks.kernels_end_to_end --device cuda            # writes results/kernels_end_to_end_<chip>.json
    python -m benchmarks.kernels_end_to_end --tiny                   # toy sizes, on any device: that it runs

`torch` is with the kernels off, `auto` as they run by default (after `python -m benchmarks.kernels --device cuda
--tune`), `triton` with all of them forced on. The ways take turns; times are of the host's clock, waited for, medians
with the 20th and 80th percentile; `faster` is the median over the rounds of torch / this. Models are random, of the
shapes named; a decoding step is one forward over a static cache, launched by the host (`eager`) or replayed as a CUDA
graph (`graph`).
What the file holds of the same sources is not measured again, and a case that fails says why.
"""

from __future__ import annotations

import argparse
import copy
import gc
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import nn

from benchmarks.kernels_rows import Rows
from benchmarks.kernels_timing import DeviceLostError, about, check_device, comparable, in_turns, message, spread
from benchmarks.measure import ROOT, synchronize
from hf_qst_kernels import break_even, use_backend

RESULTS = Path(__file__).parent / "results"
KEY = ("case", "model", "detail")
# Seconds before the end in which no case is begun, on a GPU.
NOTICE = 45.0


def _llama(vocab, hidden, layers, heads, kv_heads, intermediate) -> dict:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    }


LLAMAS = {
    "llama-1b": _llama(128256, 2048, 16, 32, 8, 8192),
    "llama-8b": _llama(128256, 4096, 32, 32, 8, 14336),
    "tiny": _llama(512, 64, 2, 4, 2, 192),
}


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Args:
        tokens: of a training step, in sequences of at most 512.
        batches, nf4_batches, low_rank_batches: sequences decoded at once.
        cache: positions of the static cache, half of them filled.
        steps: decoding steps of a timed call.
        rounds: timed calls of each way.
    """

    tokens: int = 2048
    batches: tuple[int, ...] = (1, 8)
    nf4_batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    low_rank_batches: tuple[int, ...] = (1, 8)
    cache: int = 512
    steps: int = 8
    rounds: int = 9


TINY = Sizes(tokens=32, batches=(2,), nf4_batches=(2,), low_rank_batches=(2,), cache=16, steps=2, rounds=2)


@dataclass(frozen=True)
class Made:
    """What a case measures.

    Args:
        calls: way -> a call; those named in `backends` run with the kernels so forced.
        backends: way -> backend.
        before: done before each call, not timed.
        per_call: steps of a call.
        facts: more of the row.
    """

    calls: dict[str, Callable]
    backends: dict[str, str]
    before: Callable = lambda: None
    per_call: int = 1
    facts: dict | None = None


Cases = Iterator[tuple[str, Callable[[], Made]]]


def ways(device: torch.device) -> dict[str, str]:
    """Way -> backend; without a GPU nothing can be forced."""
    return {name: name for name in ("torch", "auto", "triton")[: 3 if device.type == "cuda" else 2]}


def dense_llama(config: dict, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A random Llama, frozen, made on `device` in `dtype`."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(**config)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.requires_grad_(False).parameters():
        parameter.normal_(0.0, 0.02, generator=generator) if parameter.dim() > 1 else parameter.fill_(1.0)
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    return model.eval()


def nf4_llama(config: dict, device: torch.device) -> nn.Module:
    """The same in NF4, a weight at a time."""
    from benchmarks.side_tuning_bases import random_base
    from hf_qst.packed_weights import forbid_packing

    model = random_base(config, device).requires_grad_(False)
    forbid_packing(model)
    return model


# --- a training step -------------------------------------------------------------------------------------------------


def qst_steps(config: dict, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Cases:
    """A step of quantized side tuning, optimiser included, of the default downsampler and of the fixed projection."""
    base = _once(lambda: nf4_llama(config, device))
    for downsample in ("adapter", "principal"):
        yield (
            f"{downsample}, {sizes.tokens} tokens",
            lambda downsample=downsample: _qst(base(), downsample, device, sizes),
        )


def _qst(base: nn.Module, downsample: str, device: torch.device, sizes: Sizes) -> Made:
    from peft import get_peft_model

    from benchmarks.side_tuning_bases import copy_of
    from hf_qst import QSTConfig

    torch.manual_seed(0)
    model = get_peft_model(copy_of(base), QSTConfig(task_type="CAUSAL_LM", downsample=downsample)).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True)
    length = min(512, sizes.tokens)
    ids = torch.randint(base.config.vocab_size, (sizes.tokens // length, length), device=device)

    def step():
        mixed = torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()
        with mixed:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    names = ways(device)
    facts = {"trainable": sum(p.numel() for p in trainable)}
    return Made(dict.fromkeys(names, step), names, facts=facts)


# --- decoding --------------------------------------------------------------------------------------------------------


class Decoder:
    """Decoding steps of a model over a static cache whose first half is there."""

    def __init__(self, model: nn.Module, batch: int, cache: int, device: torch.device):
        from transformers import StaticCache

        self.model, self.filled = model, cache // 2
        self.cache = StaticCache(config=model.config, max_cache_len=cache)
        self.ids = torch.ones(batch, 1, dtype=torch.int64, device=device)
        self.positions = torch.full((batch, 1), self.filled, device=device)
        # as it goes into the attention, so that no step makes one of its own
        self.mask = torch.ones(batch, 1, 1, cache, dtype=torch.bool, device=device)

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        """Logits [batch, 1, vocab] of the next token."""
        return self.model(
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        ).logits

    def rewind(self) -> None:
        """Forget what was decoded."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.filled)

    def captured(self) -> Callable:
        """The step as a CUDA graph; call its result to replay it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        self.rewind()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.step()

        def replay():
            graph.replay()
            return logits

        return replay


def decoding(
    models: Callable[[], dict[str, tuple[nn.Module, str]]],
    batches: tuple[int, ...],
    device: torch.device,
    sizes: Sizes,
    prefix: str = "",
    facts: Callable[[], dict] = dict,
) -> Cases:
    """
    Cases of a decoding step at each batch, on a GPU as a graph; eager at the first, for what the host takes is the same
    at each.

    Args:
        models: way -> a model, and the backend that it is run with.
    """
    modes = [(batch, "graph") for batch in batches] if device.type == "cuda" else []
    modes += [(batches[0], "eager")]
    for batch, mode in modes:

        def make(batch=batch, mode=mode):
            made = models()
            decoders = {way: Decoder(model, batch, sizes.cache, device) for way, (model, _) in made.items()}
            backends = {way: backend for way, (_, backend) in made.items()}
            steps = {}

            def call(way):
                if way not in steps:  # the kernels are chosen while the graph is captured
                    decoders[way].step()
                    decoders[way].rewind()
                    steps[way] = decoders[way].captured() if mode == "graph" else decoders[way].step
                    decoders[way].rewind()
                for _ in range(sizes.steps):
                    logits = steps[way]()
                return logits

            def before():
                for way in steps:
                    decoders[way].rewind()

            return Made({way: lambda way=way: call(way) for way in made}, backends, before, sizes.steps, facts())

        yield f"{prefix}batch {batch}, {mode}", make


def pruned_decoding(config: dict, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Cases:
    """A model with half of its blocks' weights beside the dense one."""
    both = _once(lambda: _pruned(config, device, dtype))

    def models():
        dense, small, _ = both()
        return {"dense": (dense, "torch")} | {way: (small, backend) for way, backend in ways(device).items()}

    yield from decoding(models, sizes.batches, device, sizes, facts=lambda: {"kept": both()[2]})


def _pruned(config: dict, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, float]:
    """The dense model, one with half of its weights in the blocks, and the share that was kept."""
    from hf_qst import prune_blocks
    from hf_qst.decoder_stack import find_decoder_stack
    from hf_qst.disp.layout import SELECTIONS, PruningLayout

    dense = dense_llama(config, device, dtype)
    layout = PruningLayout.of(find_decoder_stack(dense))
    multiple = 64 if layout.hidden_size >= 1024 else 8
    rounded = lambda width: max(multiple, round(width / multiple) * multiple)
    # Shares of arXiv 2410.11988, figure 6, at 50%; what the MLP keeps inside makes up for the rest.
    read, write = rounded(0.63 * layout.hidden_size), rounded(0.93 * layout.hidden_size)
    attention = read * (layout.query_size + 2 * layout.key_size) + layout.query_size * write
    left = layout.total / (2 * layout.num_layers) - attention
    middle = min(rounded(left / (layout.mlp_inputs * read + write)), layout.intermediate_size)
    widths = dict(zip(SELECTIONS, (read, write, read, middle, write), strict=True))
    generator = torch.Generator().manual_seed(0)

    def mask(name: str) -> torch.Tensor:
        chosen = torch.randperm(layout.size(name), generator=generator)[: widths[name]]
        return torch.zeros(layout.size(name), dtype=torch.bool).index_fill_(0, chosen, True).to(device)

    masks = [{name: mask(name) for name in SELECTIONS} for _ in range(layout.num_layers)]
    kept = layout.count([list(widths.values())] * layout.num_layers) / layout.total
    return dense, prune_blocks(copy.deepcopy(dense), masks).eval(), kept


def nf4_decoding(config: dict, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Cases:
    """A 4-bit model with bitsandbytes' layers as they are, and with those that may use `nf4_linear`."""

    def make():
        from benchmarks.side_tuning_bases import copy_of
        from hf_qst.nf4_layers import use_nf4_kernels

        plain = nf4_llama(config, device)
        ours = copy_of(plain)
        return plain, ours, use_nf4_kernels(ours)

    both = _once(make)

    def models():
        plain, ours, _ = both()
        return {"bitsandbytes": (plain, "torch")} | {way: (ours, backend) for way, backend in ways(device).items()}

    yield from decoding(models, sizes.nf4_batches, device, sizes, facts=lambda: {"layers": both()[2]})


def low_rank_decoding(config: dict, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Cases:
    """A model whose layers are pairs of factors: of rank 16, and of 40% of the dense layers' weights."""
    dense = _once(lambda: dense_llama(config, device, dtype))
    for name, keep in (("rank 16", None), ("40% kept", 0.4)):
        small = _once(lambda keep=keep: _factored(dense(), keep))

        def models(small=small):
            return {"dense": (dense(), "torch")} | {way: (small(), backend) for way, backend in ways(device).items()}

        yield from decoding(models, sizes.low_rank_batches, device, sizes, f"{name}, ")


def _factored(dense: nn.Module, keep: float | None) -> nn.Module:
    from hf_qst import MixedRankConfig
    from hf_qst.linear_layers import dense_shape
    from hf_qst.mixed_rank import LowRankLinear
    from hf_qst.mixed_rank.targets import find_targets

    names = list(find_targets(dense, MixedRankConfig()))
    # what is not replaced is shared with the dense model
    shared = {id(tensor): tensor for tensor in [*dense.parameters(), *dense.buffers()]}
    small = copy.deepcopy(dense, shared)
    for name in names:
        layer = dense.get_submodule(name)
        inputs, outputs = dense_shape(layer)
        rank = 16 if keep is None else max(8, int(keep * inputs * outputs / (inputs + outputs)) // 8 * 8)
        made = LowRankLinear(inputs, outputs, min(rank, inputs), layer.bias is not None, device=layer.weight.device)
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=0.02)
        small.set_submodule(name, made.to(layer.weight.dtype).requires_grad_(False))
    return small.eval()


CASES = {
    "QST step": qst_steps,
    "pruned decoding": pruned_decoding,
    "NF4 decoding": nf4_decoding,
    "low-rank decoding": low_rank_decoding,
}


# --- measuring -------------------------------------------------------------------------------------------------------


def _once(make: Callable):
    """`make`, whose result is kept."""
    kept = []

    def result():
        if not kept:
            kept.append(make())
        return kept[0]

    return result


def measure_case(made: Made, device: torch.device, rounds: int) -> dict:
    """Seconds a step of each way, what it needed of memory, and how much faster than `torch` it was."""
    found, calls = {}, {}

    def with_backend(way: str) -> Callable:
        def call():
            with use_backend(made.backends[way]):
                return made.calls[way]()

        return call

    results = {}
    for way in made.calls:
        call = with_backend(way)
        try:
            made.before()
            result = call()  # compiles, captures, warms up
            if isinstance(result, torch.Tensor):
                results[way] = result.float().clone()
            synchronize(device)
            made.before()
            found[way] = _peak(call, device)
            calls[way] = call
        except Exception as error:
            found[way] = {"failed": message(error)}
            check_device(device, error)
    times = in_turns(calls, rounds, device, made.before)
    for way in calls:
        seconds = [t / made.per_call for t in times[way]]
        middle, fifths = spread(seconds)
        found[way] |= {"seconds": middle, "seconds_p20_p80": fifths}
        # "dense" of the pruned and low-rank models computes something else
        for other, name in (("torch", "faster"), ("dense", "faster_than_dense"), ("bitsandbytes", "faster_than_bnb")):
            if other in calls and way != other:
                # logits of the same weights, in parts of the largest
                if way in results and other in results and "dense" not in (way, other):
                    distance = (results[way] - results[other]).abs().max() / results[other].abs().max()
                    found[way].setdefault("difference", distance.item())
                found[way][name] = median(a / b for a, b in zip(times[other], times[way], strict=True))
    return found


def _peak(call: Callable, device: torch.device) -> dict[str, int | None]:
    """Most bytes on the device during a call, with all that lies there, and above that."""
    if device.type != "cuda":
        call()
        return {"peak_bytes": None, "above_bytes": None}
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    return {"peak_bytes": peak, "above_bytes": peak - before}


def fingerprint() -> str:
    """Of the sources that decide what runs here."""
    files = [*(ROOT / "kernels" / "hf_qst_kernels").glob("*.py"), *(ROOT / "hf_qst").rglob("*.py"), Path(__file__)]
    tables = [*break_even.SHIPPED.glob("*.json"), *break_even.user_folder().glob("*.json")]
    # of a table, what it decides; not when or with which versions it was written
    decided = [json.dumps(json.loads(path.read_text()).get("decisions"), sort_keys=True) for path in sorted(tables)]
    parts = [path.read_text(encoding="utf-8") for path in sorted(files)] + decided
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def measure_all(
    device: torch.device,
    models: list[str],
    output: Path,
    sizes: Sizes,
    cases: list[str] | None = None,
    until: float = float("inf"),
) -> dict:
    """
    Measure and write `output` after each case; rows that it holds of the same sources and tables stay.

    Args:
        until: when to stop, in seconds since the epoch.

    Returns:
        The report as it is in the file, and `left`: the cases that there was no time for.

    Raises:
        DeviceLostError: this process cannot go on; the case that did it says so, and another process can.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    report = {**about(device), "dtype": str(dtype), "sources": fingerprint(), "rows": []}
    if output.exists():
        before = json.loads(output.read_text())
        if comparable(before, report):
            report["rows"] = before["rows"]
    # a case builds its models first, which takes longer than a row
    held = Rows(report, output, until - (NOTICE if device.type == "cuda" else 0))
    done, left = {tuple(row[name] for name in KEY) for row in report["rows"]}, []
    for case, make_cases in CASES.items():
        if cases is not None and case not in cases:
            continue
        for model in models:
            for detail, make in make_cases(LLAMAS[model], device, dtype, sizes):
                key = (case, model, detail)
                if key in done:
                    continue
                if held.late:
                    left.append(", ".join(key))
                    continue
                row = dict(zip(KEY, key, strict=True))
                if (reason := held.begin(row)) is not None:
                    held.add({**row, "failed": reason})
                    continue
                try:
                    made = make()
                    row |= {**(made.facts or {}), "ways": measure_case(made, device, sizes.rounds)}
                    del made
                    held.add(row)
                except Exception as error:
                    held.add({**row, "failed": message(error)})
                    held.write()
                    if isinstance(error, DeviceLostError):
                        raise
                    check_device(device, error)
                print(describe(report["rows"][-1]), flush=True)
                held.write()
                release(device)
    held.write()
    return {**report, "left": left}


def release(device: torch.device) -> None:
    """Give freed memory back, so that one model's does not stand in another's way."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def describe(row: dict) -> str:
    """One line a way."""
    start = ", ".join(str(row[name]) for name in KEY)
    if "failed" in row:
        return f"{start}: {row['failed']}"
    lines = []
    for way, found in row["ways"].items():
        text = found.get("failed") or f"{1e3 * found['seconds']:.2f} ms"
        faster = f", {found['faster']:.2f}x" if "faster" in found else ""
        lines.append(f"{start}: {way} {text}{faster}")
    return "\n".join(lines)


def table(rows: list[dict]) -> str:
    """In Markdown."""
    lines = ["| case | model | what | way | ms a step | p20-p80 | torch / this | dense, bnb / this | peak GiB | above MiB |",
             "| --- | --- | --- | --- | ---: | --- | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for row in rows:
        start = f"| {row['case']} | {row['model']} | {row['detail']}"
        if "failed" in row:
            lines.append(f"{start} | | {row['failed']} | | | | | |")
            continue
        for way, found in row["ways"].items():
            if "failed" in found:
                lines.append(f"{start} | {way} | {found['failed']} | | | | | |")
                continue
            low, high = (1e3 * s for s in found["seconds_p20_p80"])
            other = found.get("faster_than_dense", found.get("faster_than_bnb"))
            ratios = [f"{r:.2f}" if r is not None else "" for r in (found.get("faster"), other)]
            peak = " | "
            if found["peak_bytes"] is not None:
                peak = f"{found['peak_bytes'] / 2**30:.2f} | {found['above_bytes'] / 2**20:.0f}"
            lines.append(f"{start} | {way} | {1e3 * found['seconds']:.2f} | {low:.2f}-{high:.2f} | "
                         f"{ratios[0]} | {ratios[1]} | {peak} |")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--models", nargs="+", default=None, choices=LLAMAS)
    parser.add_argument("--cases", nargs="+", default=None, choices=CASES)
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device, and torch finds none")
    if args.device == "cpu" and not args.tiny:
        parser.error("models of these sizes take a GPU: give --device cuda, or --tiny")
    device = torch.device(args.device)
    chip = break_even.chip_of(torch.cuda.get_device_name()) if args.device == "cuda" else "cpu"
    output = args.output or RESULTS / f"kernels_end_to_end_{chip}.json"
    models = args.models or (["tiny"] if args.tiny else ["llama-1b", "llama-8b"])
    report = measure_all(device, models, output, TINY if args.tiny else Sizes(), args.cases)
    print(table(report["rows"]))
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
