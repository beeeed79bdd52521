"""Logits processors for `generate`: they divide the scores of each row by the temperature of a policy."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import LogitsProcessor

from hf_qst.tuner.config import is_count
from hf_qst_plugins.adaptive_temperature.policies import BlockStart, Temperature, TemperaturePolicy, positive
from hf_qst_plugins.adaptive_temperature.token_automaton import DeviceCopies
from hf_qst_plugins.adaptive_temperature.vocabulary import TokenKind, VocabularyTable

PRESETS = {
    "default": {"block_temperature": 0.8, "temperature": 0.5},
    "humaneval": {"block_temperature": 0.8, "temperature": 0.6},
    "mbpp": {"block_temperature": 0.8, "temperature": 0.3},
    "mbpp-command": {"block_temperature": 0.6, "temperature": 0.5},
    "pass1": {"block_temperature": 0.2, "temperature": 0.01},
}
"""Pairs of temperatures. All but `default` are from the authors' README, with top_p=0.95: `humaneval` and `mbpp` are for
these benchmarks (for MBPP its text and its command differ), `pass1` is for one sample per task."""

Rule = Callable[[VocabularyTable], TemperaturePolicy]


def preset_temperatures(preset: str) -> dict[str, float]:
    """The temperatures of a preset.

    Raises:
        ValueError: an unknown preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    return dict(PRESETS[preset])


def table_of(tokenizer_or_table, language: str | None) -> VocabularyTable:
    """The given table, or the table of a tokenizer.

    Raises:
        ValueError: `language` is not that of the given table.
    """
    if not isinstance(tokenizer_or_table, VocabularyTable):
        return VocabularyTable.from_tokenizer(tokenizer_or_table, language=language or "python")
    if language not in (None, tokenizer_or_table.language):
        raise ValueError(
            f"language must be that of the table, {tokenizer_or_table.language!r}, or left out, got {language!r}"
        )
    return tokenizer_or_table


def divided(scores: torch.FloatTensor, temperature: Temperature) -> torch.FloatTensor:
    """`scores` `[batch, vocabulary]` divided by one temperature, or by one per row; a new tensor of the same dtype."""
    if isinstance(temperature, float):
        return scores / temperature
    return (scores / temperature.unsqueeze(-1)).to(scores.dtype)


class AdaptiveTemperatureLogitsProcessor(LogitsProcessor):
    """Samples code with one temperature where a block of code starts and another elsewhere.

        model.generate(**inputs, do_sample=True, temperature=1.0, top_k=0, top_p=0.95,
                       logits_processor=[AdaptiveTemperatureLogitsProcessor(tokenizer)])

    The decision depends on `input_ids` alone and no text is decoded, so one object serves batches, padded rows, assisted
    decoding and several calls. `temperature=` of `generate` multiplies: leave it at 1.0. With `do_sample=False` the
    processor has no effect, because a temperature does not change which score is largest.

    Zhu et al., arXiv 2309.02772.

    Args:
        tokenizer (`PreTrainedTokenizerBase` or `VocabularyTable`): the model's tokenizer.
        block_temperature (`float`, *optional*): for tokens that start a block, the paper's a; 0.8 by default.
        temperature (`float`, *optional*): for all others, the paper's b; 0.5 by default.
        scope (`str`, *optional*): `"line"` (default), `"line+col0"`, `"block"` or `"reference"`; see `BlockStart`.
        language (`str`, *optional*): of the code, for `scope="block"`; `"python"` by default.
        region (`str`, *optional*): `"all"` (default) or `"fenced"`; see `BlockStart`.
        preset (`str`, *optional*): a pair of temperatures of `PRESETS`; the two temperature arguments override it.
        rule (`Callable[[VocabularyTable], TemperaturePolicy]`, *optional*): makes the policy from the table; instead of
            the arguments from `block_temperature` to `preset`.
        max_batch_size (`int`, *optional*): the most rows that a call may have.

    Raises:
        ValueError: a value out of range, or a tokenizer without newline or indentation tokens.
    """

    # Continuous batching passes a processor only the last token.
    supports_continuous_batching = False

    def __init__(
        self,
        tokenizer,
        block_temperature: float | None = None,
        temperature: float | None = None,
        scope: str | None = None,
        language: str | None = None,
        region: str | None = None,
        preset: str | None = None,
        rule: Rule | None = None,
        max_batch_size: int | None = None,
    ):
        if max_batch_size is not None and not is_count(max_batch_size):
            raise ValueError(f"max_batch_size must be an integer >= 1 or None, got {max_batch_size!r}")
        self.max_batch_size = max_batch_size
        settings = {
            "block_temperature": block_temperature,
            "temperature": temperature,
            "scope": scope,
            "region": region,
        }
        settings = {name: value for name, value in settings.items() if value is not None}
        if rule is None:
            self.policy: TemperaturePolicy = BlockStart(
                table_of(tokenizer, language), **{**preset_temperatures(preset or "default"), **settings}
            )
            return
        if settings or preset is not None:
            also = ", ".join([*settings, *(["preset"] if preset is not None else [])])
            raise ValueError(f"rule makes the whole policy: leave out {also}, or set them in the rule")
        self.policy = rule(table_of(tokenizer, language))
        if not callable(self.policy):
            raise TypeError(f"rule must return a policy, called with (input_ids, scores), got {self.policy!r}")

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """`scores` `[batch, vocabulary]` divided by the rows' temperatures; `input_ids` is `[batch, length]`."""
        if input_ids.ndim != 2 or input_ids.shape[0] != scores.shape[0]:
            raise ValueError(
                f"input_ids must be [batch, length] with the {scores.shape[0]} rows of scores, got "
                f"{list(input_ids.shape)}; continuous batching passes last tokens alone, for which there is "
                "LastTokenTemperatureLogitsProcessor"
            )
        if self.max_batch_size is not None and scores.shape[0] > self.max_batch_size:
            raise ValueError(
                f"a batch of {scores.shape[0]} rows, but max_batch_size={self.max_batch_size} was promised"
            )
        return divided(scores, self.policy(input_ids, scores))


class LastTokenTemperatureLogitsProcessor(LogitsProcessor):
    """The rule `scope="line"` decided by the last token alone, for continuous batching, which passes no more than that.

    Hot after a token that ends in a line break and indentation, or that is three or more columns of whitespace. Two
    short indentation tokens in a row, and wide whitespace within a line, are misjudged.

    Args:
        tokenizer, block_temperature, temperature, preset: see `AdaptiveTemperatureLogitsProcessor`.

    Raises:
        ValueError: a value out of range, or no token of the vocabulary is hot.
    """

    supports_continuous_batching = True
    MIN_WIDTH = 3

    def __init__(
        self,
        tokenizer,
        block_temperature: float | None = None,
        temperature: float | None = None,
        preset: str | None = None,
    ):
        pair = preset_temperatures(preset or "default")
        hot, cold = (
            pair[name] if value is None else value
            for name, value in (("block_temperature", block_temperature), ("temperature", temperature))
        )
        self.block_temperature, self.temperature = positive("block_temperature", hot), positive("temperature", cold)
        table = table_of(tokenizer, None)
        wide = (table.kinds == TokenKind.BLANK) & (table.widths >= self.MIN_WIDTH)
        hot = (table.kinds == TokenKind.INDENTED_NEWLINE) | wide
        if not hot.any():
            raise ValueError(
                "the rule would never fire: no single token of this vocabulary shows that a line is indented"
            )
        hot = torch.cat([hot, hot.new_zeros(1)])  # ids that the table does not know count as content
        self._temperatures = DeviceCopies(torch.where(hot, self.block_temperature, self.temperature).to(torch.float32))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """`scores` `[rows, vocabulary]` divided by the temperatures; `input_ids` is `[rows]` or `[rows, length]`."""
        last = input_ids if input_ids.ndim == 1 else input_ids[:, -1]
        table = self._temperatures.on(scores.device)
        return divided(scores, table[last.clamp(max=len(table) - 1)])
