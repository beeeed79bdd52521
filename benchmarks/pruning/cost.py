"""Speed of pruned models against the dense one, and the cost of a step of learning the widths."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from statistics import median

import torch
from peft import get_peft_model
from torch import nn
from tqdm.auto import tqdm

from benchmarks.common.measure import peak_rss, settle_rss
from benchmarks.common.timing import in_turns, paired_ratio
from benchmarks.compression.speed import clock_of, models
from hf_qst import DISPConfig
from hf_qst.base_model import find_decoder_stack
from hf_qst.planning import SavedForBackward
from hf_qst.pruning import SELECTIONS, PruningLayout, prune_blocks, rounded_width

Widths = list[list[int]]


def layout_of(model: nn.Module) -> PruningLayout:
    """Sizes of the model's blocks, and the number of weights in their matrices."""
    return PruningLayout.of(find_decoder_stack(model))


def scaled(widths: Widths, source: PruningLayout, target: PruningLayout, multiple: int) -> Widths:
    """Widths [layers, 5] of one decoder carried over to another, in the same parts of its sizes and of its depth."""
    rows = [widths[i * source.num_layers // target.num_layers] for i in range(target.num_layers)]
    return [
        [
            rounded_width(round(width / source.size(name) * target.size(name)), target.size(name), multiple, 1)
            for name, width in zip(SELECTIONS, row, strict=True)
        ]
        for row in rows
    ]


def at_widths(dense: nn.Module, widths: Widths) -> nn.Module:
    """A copy of the model with arbitrary channels at these widths: the choice of channels does not change the cost."""
    generator = torch.Generator().manual_seed(0)

    def mask(size: int, width: int) -> torch.Tensor:
        chosen = torch.randperm(size, generator=generator)[:width]
        return torch.zeros(size, dtype=torch.bool).index_fill_(0, chosen, True).to(dense.device)

    layout = layout_of(dense)
    masks = [
        {name: mask(layout.size(name, layer), w) for name, w in zip(SELECTIONS, row, strict=True)}
        for layer, row in enumerate(widths)
    ]
    return prune_blocks(copy.deepcopy(dense), masks).eval()


def floors(layout: PruningLayout, widths: Widths, vocabulary: int, prompt: int) -> dict[str, float]:
    """How often faster the smaller model can be at most, if time goes by operations (prefill) or weights (decode).

    A prompt costs a product with every weight of the blocks for each token, the causal half of the attention's two
    products, and the head for one token; a token costs reading the weights of the blocks and the head.
    """
    head = vocabulary * layout.hidden_size
    attention = 2 * sum(block.written_width for block in layout.blocks) * prompt * prompt // 2
    work = lambda weights: weights * prompt + attention + head
    small, full = layout.count(widths), layout.total
    return {"prefill": work(full) / work(small), "decode": (full + head) / (small + head)}


@torch.no_grad()
def speed(dense: nn.Module, made: Mapping[str, Widths], prompt: int, new: int, repeats: int) -> list[dict]:
    """Tokens per second of the dense model and of copies of it at these widths, with memory and the floors."""
    device, vocabulary = next(dense.parameters()).device, dense.config.vocab_size
    layout = layout_of(dense)
    every = {"dense": dense.eval()} | {name: at_widths(dense, widths) for name, widths in made.items()}
    rows = models(every, prompt, new, repeats, vocabulary, device, logits_to_keep=1)
    ids = torch.randint(vocabulary, (1, prompt)).to(device)
    for row in rows:
        model, widths = every[row["model"]], made.get(row["model"], layout.full_widths)
        row["weights_bytes"] = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
        before = settle_rss()
        model(input_ids=ids, logits_to_keep=1)
        row["prefill_peak_bytes"] = max(0, peak_rss() - before)
        row["widths"] = widths
        row |= {f"{kind}_floor": value for kind, value in floors(layout, widths, vocabulary, prompt).items()}
    return rows


def _frozen(dense: nn.Module) -> nn.Module:
    """Gradients for the inputs alone: the least a method can cost that learns inside a frozen model."""
    model = copy.deepcopy(dense).requires_grad_(False)
    model.enable_input_require_grads()
    return model


STEPS: dict[str, tuple[str, Callable]] = {
    "floor": ("forward and backward of the frozen base", _frozen),
    "disp": ("DISP", lambda dense: get_peft_model(copy.deepcopy(dense), DISPConfig.paper(task_type="CAUSAL_LM"))),
    "full": ("full fine-tuning", lambda dense: copy.deepcopy(dense).requires_grad_(True)),
}


def training(dense: nn.Module, batch: int, length: int, repeats: int) -> list[dict]:
    """Seconds and memory of a step of each of `STEPS`, one of each in turn."""
    device = next(dense.parameters()).device
    ids = torch.randint(dense.config.vocab_size, (batch, length)).to(device)
    made = {name: make(dense).train() for name, (_, make) in STEPS.items()}
    trainable = {name: [p for p in model.parameters() if p.requires_grad] for name, model in made.items()}
    optimizers = {name: torch.optim.AdamW(those, lr=1e-5) for name, those in trainable.items() if those}

    def step(name: str) -> None:
        made[name](input_ids=ids, labels=ids, use_cache=False).loss.backward()
        if name in optimizers:
            optimizers[name].step()
            optimizers[name].zero_grad()

    times = in_turns({name: lambda name=name: step(name) for name in made}, repeats, device, clock=clock_of(device))
    rows = []
    for name, model in tqdm(made.items(), desc="memory of a step", unit="method"):
        with SavedForBackward(model) as saved:
            step(name)
        before = settle_rss()
        step(name)
        row = {"method": name, "seconds": median(times[name]), "of_floor": paired_ratio(times, name, "floor")}
        row |= {"kept_bytes": saved.peak, "peak_bytes": peak_rss() - before}
        row["trainable"] = sum(p.numel() for p in trainable[name])
        row["optimizer_bytes"] = 8 * row["trainable"]  # AdamW's two averages in float32
        rows.append(row)
    return rows
