"""A learned temperature: a logistic probe predicts how hard the next token is, and hard tokens are drawn hot.

A token is hard if the model's first choice is another token. The features are the certainty of the model and the
position of the token on its line. The probe is fitted once per model, on code the model was not trained on.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import IntEnum

import torch
import torch.nn.functional as F

from hf_qst.saved.json_files import read_json, write_json
from hf_qst_plugins.adaptive_temperature.distribution import certainty
from hf_qst_plugins.adaptive_temperature.policies import WINDOWS, TemperaturePolicy, positive, temperature_range
from hf_qst_plugins.adaptive_temperature.rules import BlockState, Place, block_rule
from hf_qst_plugins.adaptive_temperature.token_automaton import DeviceCopies, TokenAutomaton
from hf_qst_plugins.adaptive_temperature.vocabulary import VocabularyTable, require_tokenizer

FORMAT_VERSION = 1


class Position(IntEnum):
    """Position of the next token."""

    OTHER = 0
    LINE_START = 1
    """At column 0."""
    INDENTED_LINE = 2
    """First on an indented line that opens no block."""
    BLOCK_START = 3
    """First on the indented line after a block opener."""
    GAP = 4
    """After whitespace within a line."""


CERTAINTY_FEATURES = ("entropy", "1 - top probability", "top-two gap")
FEATURES = (*CERTAINTY_FEATURES, *(f"position {place.name.lower()}" for place in Position))


class PositionTable:
    """The `Position` of the next token, for rows of ids or along a text.

    Args:
        table (`VocabularyTable`): the vocabulary, with the language.
    """

    def __init__(self, table: VocabularyTable):
        self.automaton = TokenAutomaton(table, block_rule(table.language), WINDOWS["block"])
        self._of_state = DeviceCopies(torch.tensor([self._position(state) for state in self.automaton.state_values]))

    @staticmethod
    def _position(state) -> Position:
        if not isinstance(state, BlockState) or state.place == Place.LINE_START:
            return Position.LINE_START
        if state.place == Place.INDENTED:
            opened = state.after_opener and state.reading == "gap"
            return Position.BLOCK_START if opened else Position.INDENTED_LINE
        return Position.GAP if state.reading == "gap" else Position.OTHER

    def of_rows(self, input_ids: torch.Tensor) -> torch.Tensor:
        """int64 `[batch]` from `[batch, length]`."""
        return self._of_state.on(input_ids.device)[self.automaton.states(input_ids)]

    def along(self, ids: torch.Tensor) -> torch.Tensor:
        """The position of each token of one text, int64 `[length]` from `[length]`."""
        return self._of_state.on(ids.device)[self.automaton.states_along(ids)]


@dataclass
class Observations:
    """Features and labels of the tokens of a corpus, on the CPU.

    Args:
        certainty (`torch.Tensor`): float32 `[tokens, 3]`, the `CERTAINTY_FEATURES`.
        position (`torch.Tensor`): int64 `[tokens]`, the `Position`.
        hard (`torch.Tensor`): bool `[tokens]`, whether the model's first choice was another token.
    """

    certainty: torch.Tensor
    position: torch.Tensor
    hard: torch.Tensor

    def __post_init__(self):
        count = len(self.hard)
        if self.certainty.shape != (count, len(CERTAINTY_FEATURES)) or self.position.shape != (count,):
            raise ValueError(
                f"certainty must be [{count}, {len(CERTAINTY_FEATURES)}] and position [{count}] as hard is, got "
                f"{list(self.certainty.shape)} and {list(self.position.shape)}"
            )

    def __len__(self) -> int:
        return len(self.hard)

    def part(self, index) -> Observations:
        """The tokens that an index or mask selects."""
        return Observations(self.certainty[index], self.position[index], self.hard[index])

    @classmethod
    def join(cls, parts: list[Observations]) -> Observations:
        """All tokens of several observations."""
        fields = ("certainty", "position", "hard")
        return cls(*(torch.cat([getattr(part, field) for part in parts]) for field in fields))


def certainty_features(scores: torch.Tensor) -> torch.Tensor:
    """The `CERTAINTY_FEATURES` of each row, float32 `[batch, 3]` from raw scores `[batch, vocabulary]`."""
    nats, top_probability, top_two_gap = certainty(scores)
    return torch.stack([nats, 1 - top_probability, top_two_gap], dim=-1)


@torch.no_grad()
def observe(model, table: VocabularyTable, texts: Iterable[torch.Tensor]) -> Observations:
    """Run a model over texts and record every token except each text's first.

    Args:
        model (`PreTrainedModel`): a causal language model, in evaluation mode.
        table (`VocabularyTable`): of the model's tokenizer.
        texts (`Iterable[torch.Tensor]`): token ids of texts that the model was not trained on, int64 `[length]` each, no
            longer than the model's context.

    Raises:
        ValueError: no text has two tokens.
    """
    positions, parts = PositionTable(table), []
    for ids in texts:
        if len(ids) < 2:
            continue
        ids = ids.to(model.device)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        hard = logits.argmax(-1) != ids[1:]
        parts.append(Observations(certainty_features(logits).cpu(), positions.along(ids)[1:].cpu(), hard.cpu()))
    if not parts:
        raise ValueError("texts must hold at least one text of two tokens, got none")
    return Observations.join(parts)


def area_under_curve(score: torch.Tensor, hard: torch.Tensor) -> float:
    """AUC of `score` `[tokens]`: the probability that a hard token scores above an easy one; ties count half.

    Raises:
        ValueError: all tokens are hard, or all are easy.
    """
    hard = hard.bool()
    positives = int(hard.sum())
    negatives = len(hard) - positives
    if not positives or not negatives:
        raise ValueError(f"hard must hold both kinds of tokens, got {positives} hard and {negatives} easy ones")
    _, group, sizes = score.double().unique(return_inverse=True, return_counts=True)
    mean_rank = sizes.cumsum(0) - (sizes - 1) / 2  # ranks from 1, ties share their mean
    return (float(mean_rank[group][hard].sum()) - positives * (positives + 1) / 2) / (positives * negatives)


@dataclass
class DifficultyProbe:
    """Logistic regression from the `FEATURES` to the probability that a token is hard.

    Args:
        weights (`list[float]`): one per feature; the certainty features are standardised.
        bias (`float`): of the regression.
        mean, std (`list[float]`): of the certainty features on the corpus.
        tokenizer_hash (`str`): of the corpus's tokenizer.
        report (`dict`): AUC on held-out tokens of the probe, of the entropy alone and of the position alone.

    Raises:
        ValueError: a field of the wrong length.
    """

    weights: list[float]
    bias: float
    mean: list[float]
    std: list[float]
    tokenizer_hash: str
    report: dict

    def __post_init__(self):
        lengths = {"weights": len(FEATURES), "mean": len(CERTAINTY_FEATURES), "std": len(CERTAINTY_FEATURES)}
        for name, length in lengths.items():
            if len(getattr(self, name)) != length:
                raise ValueError(f"DifficultyProbe.{name} must hold {length} numbers, got {len(getattr(self, name))}")

    def difficulty(self, certainty: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Probability that a token is hard, float32 `[batch]`, from `[batch, 3]` and `[batch]`."""
        features = _standardised(certainty, position, certainty.new_tensor(self.mean), certainty.new_tensor(self.std))
        return (features @ features.new_tensor(self.weights) + self.bias).sigmoid()

    @property
    def beats_its_parts(self) -> bool:
        """Whether its AUC is above that of the entropy alone and that of the position alone."""
        return self.report["probe"] > max(self.report["entropy"], self.report["position"])

    def save(self, path: str | os.PathLike) -> None:
        """Write the probe as JSON, completely or not at all."""
        write_json(path, {"version": FORMAT_VERSION, **asdict(self)}, indent=1)

    @classmethod
    def load(cls, path: str | os.PathLike) -> DifficultyProbe:
        """Read a saved probe.

        Raises:
            ValueError: the file is not a probe of this version.
        """
        values = read_json(path)
        names = {"version", *cls.__dataclass_fields__}
        if values.keys() != names or values.pop("version") != FORMAT_VERSION:
            raise ValueError(f"{os.fspath(path)} is not a difficulty probe of version {FORMAT_VERSION}")
        return cls(**values)


def _standardised(certainty, position, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    return torch.cat([(certainty - mean) / std, F.one_hot(position, len(Position)).to(certainty.dtype)], dim=-1)


def fit_difficulty_probe(
    observations: Observations, tokenizer_hash: str, held_out: float = 0.25, penalty: float = 1e-4
) -> DifficultyProbe:
    """Fit the probe on the first tokens and evaluate it on the last ones.

    Hard tokens and easy tokens have the same total weight.

    Args:
        observations (`Observations`): at least 100 tokens.
        tokenizer_hash (`str`): `table.tokenizer_hash`.
        held_out (`float`): share of the tokens, the last ones, in the report.
        penalty (`float`): coefficient of the squared weights in the loss.

    Raises:
        ValueError: a value out of range, too few tokens, or a part without hard or without easy tokens.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be a share between 0 and 1, both excluded, got {held_out!r}")
    if len(observations) < 100:
        raise ValueError(f"observations must hold at least 100 tokens, got {len(observations)}")
    border = int(len(observations) * (1 - held_out))
    fitted, rest = observations.part(slice(0, border)), observations.part(slice(border, None))
    mean = fitted.certainty.double().mean(0)
    std = fitted.certainty.double().std(0).clamp(min=1e-6)
    features = _standardised(fitted.certainty.double(), fitted.position, mean, std)
    weights, bias = _logistic(features, fitted.hard.double(), penalty)
    probe = DifficultyProbe(weights.tolist(), float(bias), mean.tolist(), std.tolist(), tokenizer_hash, {})
    counts = torch.bincount(fitted.position, minlength=len(Position)).clamp(min=1)
    share_hard = torch.bincount(fitted.position, fitted.hard.double(), minlength=len(Position)) / counts
    probe.report = {
        "probe": area_under_curve(probe.difficulty(rest.certainty, rest.position), rest.hard),
        "entropy": area_under_curve(rest.certainty[:, 0], rest.hard),
        "position": area_under_curve(share_hard[rest.position], rest.hard),
        "tokens": len(rest),
        "hard": int(rest.hard.sum()),
    }
    return probe


def _logistic(features: torch.Tensor, hard: torch.Tensor, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights `[features]`, bias) that minimise the balanced cross entropy plus `penalty` times the squared weights."""
    weights = features.new_zeros(features.shape[1], requires_grad=True)
    bias = features.new_zeros((), requires_grad=True)
    share = hard.mean()
    balance = torch.where(hard > 0, 0.5 / share, 0.5 / (1 - share))
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(features @ weights + bias, hard, balance)
        value = value + penalty * weights.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return weights.detach(), bias.detach()


class LearnedTemperature(TemperaturePolicy):
    """T = min + (max - min) * d^gamma, with d the probe's probability that the next token is hard.

    Args:
        table (`VocabularyTable`): of the probe's tokenizer.
        probe (`DifficultyProbe`): from `fit_difficulty_probe` or `DifficultyProbe.load`.
        max_temperature (`float`): at d = 1.
        min_temperature (`float`): at d = 0.
        gamma (`float`): above 1, only the hardest tokens get a high temperature.

    Raises:
        TokenizerMismatchError: the probe was fitted with another tokenizer.
        ValueError: a value out of range, naming it.
    """

    def __init__(
        self,
        table: VocabularyTable,
        probe: DifficultyProbe,
        max_temperature: float = 0.8,
        min_temperature: float = 0.2,
        gamma: float = 1.0,
    ):
        require_tokenizer(probe.tokenizer_hash, table.tokenizer_hash, "the difficulty probe")
        self.max_temperature, self.min_temperature = temperature_range(max_temperature, min_temperature)
        self.gamma = positive("gamma", gamma)
        self.probe = probe
        self._positions = PositionTable(table)
        self._mean, self._std = DeviceCopies(torch.tensor(probe.mean)), DeviceCopies(torch.tensor(probe.std))
        self._slopes = DeviceCopies(torch.tensor(probe.weights[: len(CERTAINTY_FEATURES)]))
        self._of_position = DeviceCopies(torch.tensor(probe.weights[len(CERTAINTY_FEATURES) :]) + probe.bias)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        device = scores.device
        standardised = (certainty_features(scores) - self._mean.on(device)) / self._std.on(device)
        logit = (standardised * self._slopes.on(device)).sum(-1)
        logit = logit + self._of_position.on(device)[self._positions.of_rows(input_ids)]
        span = self.max_temperature - self.min_temperature
        return self.min_temperature + span * logit.sigmoid() ** self.gamma
