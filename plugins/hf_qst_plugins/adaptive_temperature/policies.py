"""Policies: the temperature of each row.

A policy is a function of `(input_ids, scores)` without state. `generate` rewinds rows (assisted decoding), reorders them
(beams) and uses one object for several models and calls, so a counter across calls would be wrong.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np
import torch

from hf_qst_plugins.adaptive_temperature.distribution import entropy, runs_on_host
from hf_qst_plugins.adaptive_temperature.rules import TokenRule, rule_for
from hf_qst_plugins.adaptive_temperature.token_automaton import DeviceCopies, TokenAutomaton
from hf_qst_plugins.adaptive_temperature.vocabulary import VocabularyTable

Temperature = float | torch.Tensor
REGIONS = ("all", "fenced")
MOST_ROWS_PICKED = 0.75
"""Above this share of the rows, computing the entropy of all rows is no slower than of the selected ones."""
WINDOWS = {"line": 16, "line+col0": 16, "reference": 16, "block": 128}
"""Tokens that each scope looks back. The opener of a block can be much farther back than the indentation."""


def positive(name: str, value: float, greedy: str = "do_sample=False") -> float:
    """`value` as a float; `greedy` tells the user how to get greedy decoding instead.

    Raises:
        ValueError: not a finite number above 0 in float32.
    """
    limits = torch.finfo(torch.float32)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not limits.tiny <= value <= limits.max:
        raise ValueError(f"{name} must be a finite number above 0 (for greedy decoding use {greedy}), got {value!r}")
    return float(value)


class TemperaturePolicy(ABC):
    """Computes a temperature per row from the row's ids and its scores."""

    @abstractmethod
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Temperature:
        """The temperatures, finite and above 0.

        Args:
            input_ids (`torch.LongTensor` `[batch, length]`): prompt and tokens so far; the length may be 0.
            scores (`torch.FloatTensor` `[batch, vocabulary]`): raw logits of the next token, -inf for excluded tokens.

        Returns:
            A float if all rows share one temperature, else float32 `[batch]`.
        """


class BlockStart(TemperaturePolicy):
    """The paper's rule: `block_temperature` for tokens that start a block of code, `temperature` for all others.

    Zhu et al., arXiv 2309.02772: T(t) = a if the token to be drawn is a challenging one, else b.

    Args:
        table (`VocabularyTable`): the vocabulary, with the language.
        block_temperature (`float`): the paper's a.
        temperature (`float`): the paper's b.
        scope (`str`): which tokens start a block. `"line"`: the first of any indented line. `"line+col0"`: of any line.
            `"block"`: of the first indented line after a block opener. `"reference"`: as in the authors' code, after a
            newline token and one or more tab or four-space tokens.
        region (`str`): `"all"`, or `"fenced"`: only inside ``` fences, for chat answers. Fences of the prompt count, so
            every step gathers over the whole row.
        window (`int`, *optional*): tokens that the rule looks back, a power of two; by default 16, for `"block"` 128.
        rule (`TokenRule`, *optional*): your own rule instead of a scope.

    Raises:
        ValueError: a value out of range, naming it.
    """

    def __init__(
        self,
        table: VocabularyTable,
        block_temperature: float = 0.8,
        temperature: float = 0.5,
        scope: str = "line",
        region: str = "all",
        window: int | None = None,
        rule: TokenRule | None = None,
    ):
        self.block_temperature = positive("block_temperature", block_temperature)
        self.temperature = positive("temperature", temperature)
        if region not in REGIONS:
            raise ValueError(f"region must be one of {', '.join(REGIONS)}, got {region!r}")
        self.scope = scope if rule is None else "own rule"
        self.region = region
        self.automaton = TokenAutomaton(
            table,
            rule_for(scope, table.language) if rule is None else rule,
            WINDOWS.get(self.scope, 16) if window is None else window,
        )
        self._pair = np.array([self.temperature, self.block_temperature], np.float32)
        hot = torch.tensor(self.automaton.hot_states)
        self._hot_states = DeviceCopies(hot)
        self._state_temperatures = DeviceCopies(
            torch.where(hot, self.block_temperature, self.temperature).to(torch.float32)
        )
        self._fences = _fences(table) if region == "fenced" else None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Temperature:
        if self.block_temperature == self.temperature:
            return self.temperature
        if runs_on_host(input_ids):
            return self._of_rows(self._hot_rows(input_ids))
        temperatures = self._state_temperatures.on(input_ids.device)[self.automaton.states(input_ids)]
        if self._fences is not None:
            temperatures = torch.where(self._fenced(input_ids), temperatures, self.temperature)
        return temperatures

    def _of_rows(self, hot: np.ndarray) -> Temperature:
        count = np.count_nonzero(hot)
        if count == 0:
            return self.temperature
        if count == len(hot):
            return self.block_temperature
        return torch.from_numpy(self._pair.take(hot))

    def hot_rows(self, input_ids: torch.LongTensor) -> list[bool]:
        """Whether the next token of each row is drawn hot; `input_ids` `[batch, length]` is on the CPU."""
        return self._hot_rows(input_ids).astype(bool).tolist()

    def _hot_rows(self, input_ids: torch.LongTensor) -> np.ndarray:
        hot = self.automaton.hot_rows(input_ids)
        if self._fences is not None and hot.any():
            hot &= self._fenced(input_ids).numpy()
        return hot

    def hot_along(self, ids: torch.LongTensor) -> torch.Tensor:
        """Whether each token of one text is drawn hot when the text is generated, bool `[length]` from `[length]`."""
        hot = self._hot_states.on(ids.device)[self.automaton.states_along(ids)]
        if self._fences is not None:
            marks = self._fence_counts(ids).cumsum(0)
            hot = hot & (torch.cat([marks.new_zeros(1), marks[:-1]]) % 2 == 1)
        return hot

    def _fence_counts(self, ids: torch.Tensor) -> torch.Tensor:
        table = self._fences.on(ids.device)
        return table[ids.clamp(max=len(table) - 1)]

    def _fenced(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self._fence_counts(input_ids).sum(-1) % 2 == 1


def _fences(table: VocabularyTable) -> DeviceCopies:
    """Number of fences in each token; the last entry is for ids that the table does not know.

    Raises:
        ValueError: no token holds a whole fence.
    """
    counts = [(text or "").count("```") for text in table.texts]
    if not any(counts):
        raise ValueError('region="fenced" needs a token that holds a whole ``` fence, this vocabulary has none')
    return DeviceCopies(torch.tensor([*counts, 0], dtype=torch.uint8))


class EntropyTemperature(TemperaturePolicy):
    """A higher temperature where the model is uncertain, at any position.

    `kind="edt"` (Zhang et al., arXiv 2403.14541): T = max_temperature * 0.8^(theta / H).
    `kind="power"` (llama.cpp's dynamic temperature): T = min + (max - min) * (H / ln V)^exponent, V the vocabulary size.
    H is the entropy in nats of the softmax of the raw scores. Both rise with H; `"edt"` is at least `min_temperature`.

    Args:
        max_temperature (`float`): upper limit.
        min_temperature (`float`): lower limit.
        kind (`str`): `"edt"` or `"power"`.
        theta (`float`): of `"edt"`; the larger, the more entropy a high temperature needs.
        exponent (`float`): of `"power"`; below 1, a high temperature needs less entropy.

    Raises:
        ValueError: a value out of range, naming it.
    """

    BASE = 0.8

    def __init__(
        self,
        max_temperature: float = 0.8,
        min_temperature: float = 0.2,
        kind: str = "edt",
        theta: float = 0.1,
        exponent: float = 1.0,
    ):
        if kind not in ("edt", "power"):
            raise ValueError(f"kind must be edt or power, got {kind!r}")
        self.max_temperature, self.min_temperature = temperature_range(max_temperature, min_temperature)
        self.kind = kind
        self.theta = positive("theta", theta)
        self.exponent = positive("exponent", exponent)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        return self.of_entropy(entropy(scores), scores.shape[-1])

    def of_entropy(self, nats: torch.Tensor, vocabulary: int) -> torch.Tensor:
        """The temperatures for entropies `[batch]` over a vocabulary of this size."""
        low, high = self.min_temperature, self.max_temperature
        if self.kind == "edt":
            # H = 0 gives 0.8^inf = 0, which the clamp raises to `min_temperature`.
            return (high * self.BASE ** (self.theta / nats)).clamp(min=low)
        share = (nats / math.log(max(vocabulary, 2))).clamp(0, 1)
        return low + (high - low) * share**self.exponent


def temperature_range(max_temperature: float, min_temperature: float) -> tuple[float, float]:
    """Both as floats.

    Raises:
        ValueError: a value is not finite and above 0, or the maximum is below the minimum.
    """
    high, low = positive("max_temperature", max_temperature), positive("min_temperature", min_temperature)
    if high < low:
        raise ValueError(f"max_temperature must be at least min_temperature={low}, got {high}")
    return high, low


class EntropyGate(TemperaturePolicy):
    """Another policy's temperature where the model is uncertain, one low temperature elsewhere.

    A trained model is certain at most block starts, and a high temperature cannot help there.

    Args:
        policy (`TemperaturePolicy`): gives the temperature of uncertain rows.
        min_entropy (`float`): in nats; rows above it are uncertain.
        temperature (`float`, *optional*): of the other rows; by default the policy's own `temperature`.

    Raises:
        ValueError: a value out of range, naming it.
    """

    def __init__(self, policy: TemperaturePolicy, min_entropy: float = 0.05, temperature: float | None = None):
        if isinstance(min_entropy, bool) or not (math.isfinite(min_entropy) and min_entropy >= 0):
            raise ValueError(f"min_entropy must be a finite number of nats >= 0, got {min_entropy!r}")
        self.policy = policy
        self.min_entropy = float(min_entropy)
        self.temperature = positive("temperature", policy.temperature if temperature is None else temperature)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Temperature:
        temperatures = self.policy(input_ids, scores)
        if isinstance(temperatures, float):
            if temperatures == self.temperature:
                return temperatures
            temperatures = torch.full(scores.shape[:1], temperatures, device=scores.device)
        if runs_on_host(scores):
            # The entropy is expensive, so it is computed only for rows whose temperature it can change.
            rows = (temperatures != self.temperature).nonzero()[:, 0]
            if len(rows) <= MOST_ROWS_PICKED * len(scores):
                certain = rows[~(entropy(scores, rows) > self.min_entropy)]
                return temperatures.index_fill(0, certain, self.temperature)
        return torch.where(entropy(scores) > self.min_entropy, temperatures, self.temperature)


class _Combined(TemperaturePolicy):
    def __init__(self, policies: tuple[TemperaturePolicy, ...], how: str):
        self.policies = policies
        self.how = how

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        temperatures = [policy(input_ids, scores) for policy in self.policies]
        full = lambda t: torch.full(scores.shape[:1], t, device=scores.device) if isinstance(t, float) else t
        each = torch.stack([full(t) for t in temperatures])
        if self.how == "product":
            return each.prod(0)
        return each.amax(0) if self.how == "max" else each.amin(0)


def combine(*policies: TemperaturePolicy, how: str = "max", min_entropy: float = 0.05) -> TemperaturePolicy:
    """Combine policies into one.

    Args:
        policies (`TemperaturePolicy`): two or more; exactly one for `how="gate"`.
        how (`str`): `"max"`, `"min"` or `"product"` of their temperatures, or `"gate"` for `EntropyGate`.
        min_entropy (`float`): of `"gate"`, in nats.

    Raises:
        ValueError: an unknown `how`, or the wrong number of policies for it.
    """
    if how not in ("max", "min", "product", "gate"):
        raise ValueError(f"how must be max, min, product or gate, got {how!r}")
    if (len(policies) != 1) if how == "gate" else (len(policies) < 2):
        raise ValueError(
            f"how={how!r} combines {'one policy' if how == 'gate' else 'two or more'}, got {len(policies)}"
        )
    return EntropyGate(policies[0], min_entropy) if how == "gate" else _Combined(policies, how)
