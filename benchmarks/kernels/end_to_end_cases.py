"""The cases of `benchmarks.kernels.end_to_end`: random models of real shapes, and the calls of each that are timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from peft import get_peft_model
from torch import nn
from transformers import StaticCache

from benchmarks.common.llama import dense_llama, llama
from benchmarks.pruning.cost import at_widths, layout_of
from hf_qst import QSTConfig
from hf_qst.base_model import forbid_packing
from hf_qst.pruning import use_kernels

LLAMAS = {
    "llama-1b": llama(128256, 2048, 16, 32, 8192, 8),
    "llama-8b": llama(128256, 4096, 32, 32, 14336, 8),
    "tiny": llama(512, 64, 2, 4, 192, 2),
}


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Args:
        tokens: of a training step, in sequences of at most 512.
        batches: sequences decoded at once.
        cache: positions of the static cache, half of them filled.
        steps: decoding steps of a timed call.
        rounds: timed calls of each way.
    """

    tokens: int = 2048
    batches: tuple[int, ...] = (1, 8)
    cache: int = 512
    steps: int = 8
    rounds: int = 9


TINY = Sizes(tokens=32, batches=(2,), cache=16, steps=2, rounds=2)


@dataclass(frozen=True)
class Made:
    """The calls of a case.

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


def nf4_llama(config: dict, device: torch.device) -> nn.Module:
    """The same in NF4, a weight at a time."""
    from benchmarks.side_tuning.bases import random_base  # needs bitsandbytes

    model = random_base(config, device).requires_grad_(False)
    forbid_packing(model)
    return model


def qst_steps(config: dict, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Cases:
    """A step of quantized side tuning, optimiser included, of the default downsampler and of the fixed projection."""
    base = cache(lambda: nf4_llama(config, device))
    for downsample in ("adapter", "principal"):
        yield (
            f"{downsample}, {sizes.tokens} tokens",
            lambda downsample=downsample: _qst(base(), downsample, device, sizes),
        )


def _qst(base: nn.Module, downsample: str, device: torch.device, sizes: Sizes) -> Made:
    from benchmarks.side_tuning.bases import copy_of

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


class Decoder:
    """Decoding steps of a model over a static cache whose first half is there."""

    def __init__(self, model: nn.Module, batch: int, cache: int, device: torch.device):
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

        yield f"batch {batch}, {mode}", make


def pruned_decoding(config: dict, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Cases:
    """Decoding of a model with half of its blocks' weights, and of the dense one."""
    both = cache(lambda: _pruned(config, device, dtype))

    def models():
        dense, small, _ = both()
        return {"dense": (dense, "torch")} | {way: (small, backend) for way, backend in ways(device).items()}

    yield from decoding(models, sizes.batches, device, sizes, facts=lambda: {"kept": both()[2]})


def _pruned(config: dict, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, float]:
    """The dense model, one with half of its weights in the blocks, and the share that was kept."""
    dense = dense_llama(config, device, dtype)
    layout = layout_of(dense)
    block, whole = layout.blocks[0], layout.size("mlp_middle")
    multiple = 64 if layout.hidden_size >= 1024 else 8
    rounded = lambda width: max(multiple, round(width / multiple) * multiple)
    # Shares of arXiv 2410.11988, figure 6, at 50%; what the MLP keeps inside makes up for the rest.
    read, write = rounded(0.63 * layout.hidden_size), rounded(0.93 * layout.hidden_size)
    attention = read * block.read_width + block.written_width * write
    left = layout.total / (2 * layout.num_layers) - attention
    middle = min(rounded(left / (block.mlp_inputs * read + write)), whole)
    widths = [[read, write, read, middle, write]] * layout.num_layers  # in the order of SELECTIONS
    return dense, use_kernels(at_widths(dense, widths)).eval(), layout.count(widths) / layout.total


CASES = {"QST step": qst_steps, "pruned decoding": pruned_decoding}
