"""Ways of drawing a token: the settings of each family of decoders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from hf_qst import AdaptiveTemperatureLogitsProcessor
from hf_qst_plugins.adaptive_temperature import (
    BlockStart,
    DifficultyProbe,
    EntropyTemperature,
    LearnedTemperature,
    VocabularyTable,
    combine,
)


class TopNSigma(LogitsProcessor):
    """Keeps the scores within n standard deviations of the largest, before any temperature (arXiv 2411.07641)."""

    def __init__(self, n: float):
        self.n = n

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """`scores` [batch, vocabulary], -inf where they are cut."""
        least = scores.amax(-1, keepdim=True) - self.n * scores.std(-1, keepdim=True)
        return scores.masked_fill(scores < least, -torch.inf)


@dataclass(frozen=True)
class Decoder:
    """One setting of one family.

    Args:
        label: what the setting is, unique in its family.
        generate: arguments of `generate`; `temperature` multiplies with what `processors` do.
        processors: table -> the logits processors.
    """

    label: str
    generate: dict = field(default_factory=dict)
    processors: Callable[[VocabularyTable], list] = field(default=lambda table: [])

    def kwargs(self, table: VocabularyTable, new_tokens: int) -> dict:
        plain = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 0.95, "max_new_tokens": new_tokens}
        return {**plain, **self.generate, "logits_processor": LogitsProcessorList(self.processors(table))}


def adaptive(label: str, make: Callable[[VocabularyTable], object]) -> Decoder:
    """A decoder whose temperature is that of the policy which `make` gives for a table."""
    return Decoder(label, processors=lambda table: [AdaptiveTemperatureLogitsProcessor(table, rule=make)])


def families(probe: DifficultyProbe) -> dict[str, list[Decoder]]:
    """The settings each family is tuned over."""
    # The last pair is the paper's rule upside down.
    pairs = ((0.8, 0.2), (0.8, 0.5), (1.2, 0.4), (0.2, 0.8))
    spans = ((0.8, 0.2), (1.2, 0.4))
    return {
        "greedy": [Decoder("", {"do_sample": False, "temperature": None, "top_p": None, "top_k": None})],
        "fixed temperature": [Decoder(f"T={t:g}", {"temperature": t}) for t in (0.2, 0.4, 0.6, 0.8, 1.0)],
        "top-p": [Decoder(f"T={t:g} p=0.8", {"temperature": t, "top_p": 0.8}) for t in (0.6, 1.0)],
        "min-p": [Decoder(f"T={t:g} p=0.1", {"temperature": t, "top_p": 1.0, "min_p": 0.1}) for t in (0.6, 1.0)],
        "top-h": [Decoder(f"T={t:g}", {"temperature": t, "top_p": 1.0, "top_h": 0.4}) for t in (0.6, 1.0)],
        "top-n-sigma": [
            Decoder(f"T={t:g} n=1", {"temperature": t, "top_p": 1.0}, lambda table: [TopNSigma(1.0)])
            for t in (0.6, 1.0)
        ],
        "adaptive (paper)": [
            adaptive(
                f"a={a:g} b={b:g} {scope}", lambda table, a=a, b=b, scope=scope: BlockStart(table, a, b, scope=scope)
            )
            for a, b in pairs
            for scope in ("line", "block")
        ],
        "adaptive, entropy gate": [
            adaptive(f"a={a:g} b={b:g}", lambda table, a=a, b=b: combine(BlockStart(table, a, b), how="gate"))
            for a, b in pairs[:3]
        ],
        "entropy": [
            adaptive(f"{kind} {b:g} to {a:g}", lambda table, a=a, b=b, kind=kind: EntropyTemperature(a, b, kind=kind))
            for a, b in spans
            for kind in ("edt", "power")
        ],
        "learned": [
            adaptive(f"{b:g} to {a:g}", lambda table, a=a, b=b: LearnedTemperature(table, probe, a, b))
            for a, b in spans
        ],
    }
