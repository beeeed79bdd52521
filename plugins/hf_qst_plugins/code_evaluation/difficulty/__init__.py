"""Which tokens of code are hard to predict: a model's losses over files, by position on the line and lexical class.

    table = measure_difficulty(model, tokenizer, [(name, text), ...])
    print(table.markdown())
    table.save("difficulty")            # difficulty.md, difficulty.json, difficulty.png in that folder

The *prediction difficulty* (PD) of a token is the rank of its loss among the tokens of its file, from 0 (the easiest) to
1. Unlike losses, it can be compared across models and tokenizers. The definition is ours, not that of Zhu et al., *Hot
or Cold?*, arXiv 2309.02772.
"""

from __future__ import annotations

import json
import logging
import tokenize
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from hf_qst.extras import require
from hf_qst.saved.whole_files import whole_file, write_text
from hf_qst.tuner.config import is_count
from hf_qst_plugins.adaptive_temperature.rules import TokenRule, block_rule, line_rule
from hf_qst_plugins.adaptive_temperature.vocabulary import VocabularyTable

from .source_classes import GROUP_OF_POSITION, GROUPS, POSITIONS, SYNTAX, SourceClasses

__all__ = ["DifficultyTable", "HotSteps", "Row", "hot_steps", "measure_difficulty", "ranks", "token_losses"]

logger = logging.getLogger(__name__)

UNCERTAIN = 0.05
"""Entropy in nats below which a temperature has almost no effect."""


@dataclass(frozen=True)
class Row:
    """One class of tokens: count, share of all tokens, mean loss and entropy in nats, mean PD."""

    split: str
    name: str
    tokens: int
    share: float
    loss: float
    pd: float
    entropy: float


@dataclass(frozen=True)
class HotSteps:
    """Share of the steps that a rule draws hot, and share where the entropy is also above `UNCERTAIN`."""

    scope: str
    hot: float
    effective: float


@dataclass(frozen=True)
class DifficultyTable:
    """Losses of a model over files, by class of the predicted token."""

    files: int
    skipped: int
    tokens: int
    rows: tuple[Row, ...]
    hot_steps: tuple[HotSteps, ...]

    def markdown(self) -> str:
        lines = [
            f"{self.tokens:,} tokens of {self.files} files"
            + (f"; {self.skipped} files that are not Python left out" if self.skipped else ""),
            "",
            "| token predicted | tokens | share | loss (nats) | PD | entropy (nats) |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        split = ""
        for row in self.rows:
            if row.split != split:
                split = row.split
                lines.append(f"| **{split}** | | | | | |")
            lines.append(
                f"| {row.name} | {row.tokens:,} | {row.share:.1%} | {row.loss:.2f} | {row.pd:.3f} | {row.entropy:.2f} |"
            )
        lines += ["", f"| rule | hot steps | of them effective (entropy > {UNCERTAIN}) |", "| --- | ---: | ---: |"]
        lines += [
            f"| {step.scope} | {step.hot:.1%} | {step.effective / step.hot if step.hot else 0.0:.1%} |"
            for step in self.hot_steps
        ]
        return "\n".join(lines) + "\n"

    def save(self, folder: str | Path) -> list[Path]:
        """Write `difficulty.md`, `difficulty.json` and `difficulty.png`; returns their paths.

        Raises:
            ImportError: matplotlib is not installed.
        """
        require("matplotlib", "difficulty.png")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"difficulty.{suffix}" for suffix in ("md", "json", "png")]
        write_text(str(paths[0]), self.markdown())
        write_text(str(paths[1]), json.dumps(asdict(self), indent=1) + "\n")
        self._plot(paths[2])
        return paths

    def _plot(self, path: Path) -> None:
        from matplotlib.figure import Figure

        rows = [row for row in self.rows if row.split in ("position", "syntax")][::-1]
        colours = ["C0" if row.split == "position" else "C1" for row in rows]
        figure = Figure(figsize=(10, 0.32 * len(rows) + 1), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        axes[0].barh([row.name for row in rows], [row.pd for row in rows], color=colours)
        axes[0].axvline(0.5, color="gray", linewidth=1)
        axes[0].set(xlabel="prediction difficulty (0.5: the average token)")
        axes[1].barh([row.name for row in rows], [row.loss for row in rows], color=colours)
        axes[1].set(xlabel="loss (nats)")
        with whole_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120)


@torch.no_grad()
def token_losses(
    model, ids: Sequence[int], start: int | None, context: int, batch_size: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """Loss and entropy in nats at temperature 1 of every token given the ones before it, float32 [tokens] each.

    Rows longer than `context` are read in windows that overlap by half, so each token after the first window has at
    least `context // 2` tokens before it. Without a `start` token, the values of the first token are NaN.
    """
    row = [] if start is None else [start]
    row += ids
    losses, entropies = (np.full(len(row), np.nan, np.float32) for _ in range(2))
    step = context // 2
    starts = list(range(0, max(1, len(row) - context + step), step))
    for at in range(0, len(starts), batch_size):
        parts = [row[begin : begin + context] for begin in starts[at : at + batch_size]]
        width = max(map(len, parts))
        # Padding goes to the right, where causal attention never looks; its predictions are not read.
        batch = torch.tensor([part + [0] * (width - len(part)) for part in parts], device=model.device)
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        logs = F.log_softmax(logits, dim=-1)
        loss = -logs.gather(-1, batch[:, 1:, None])[..., 0]
        entropy = -torch.where(logs.isfinite(), logs.exp() * logs, 0.0).sum(-1)
        for number, part in enumerate(parts):
            begin = starts[at + number]
            new = 1 if begin == 0 else context - step  # keep the predictions of the previous window
            for target, values in ((losses, loss), (entropies, entropy)):
                target[begin + new : begin + len(part)] = values[number, new - 1 : len(part) - 1].cpu().numpy()
    skip = 0 if start is None else 1
    return losses[skip:], entropies[skip:]


def ranks(losses: np.ndarray) -> np.ndarray:
    """PD of each token of one file, float64 [tokens]: 0 for the smallest loss, 1 for the largest."""
    order = np.argsort(losses, kind="stable")
    result = np.empty(len(losses))
    result[order] = np.arange(len(losses)) / max(1, len(losses) - 1)
    return result


def hot_steps(rule: TokenRule, table: VocabularyTable, ids: Sequence[int]) -> np.ndarray:
    """Whether `rule` draws each token hot given the ones before it, bool [tokens]."""
    state, hot = rule.start, np.zeros(len(ids), dtype=bool)
    for index, token in enumerate(ids):
        hot[index] = rule.hot(state)
        text = table.texts[token] if token < len(table) else "x"
        state = rule.start if text is None else rule.after(state, rule.reduce(text))
    return hot


def measure_difficulty(
    model,
    tokenizer,
    files: Iterable[tuple[str, str]],
    context: int | None = None,
    batch_size: int = 8,
    start_token: int | None = None,
    progress: bool = True,
) -> DifficultyTable:
    """Measure a model's losses over Python files, by class of the predicted token.

    Args:
        model, tokenizer: a causal language model in eval mode and its fast tokenizer.
        files: pairs of name and text. Files that `tokenize` rejects are counted and skipped.
        context: the most tokens that a prediction sees (default: the model's positions, at most 1024).
        batch_size: windows per forward pass.
        start_token: id before each file (default: the tokenizer's begin-of-text token, else its end-of-text token).
        progress: whether to show a progress bar.

    Raises:
        ValueError: no usable file, a tokenizer without character offsets, or `context` below 4 or above the model's
            positions.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer={type(tokenizer).__name__} has no character offsets; give a fast tokenizer")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1024
    context = min(positions, 1024) if context is None else context
    if not is_count(context, 4) or context > positions:
        raise ValueError(f"context must be a whole number from 4 to the model's {positions} positions, got {context!r}")
    if start_token is None:
        start_token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    table = VocabularyTable.from_tokenizer(tokenizer)
    rules = {"line": line_rule(), "block": block_rule("python")}
    columns: dict[str, list[np.ndarray]] = {}
    used = skipped = 0
    for name, text in tqdm(list(files), desc="difficulty", unit="file", disable=not progress):
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        try:
            source = SourceClasses(text)
        except (SyntaxError, tokenize.TokenError) as error:
            logger.warning("%s is left out, it is not Python: %s", name, error)
            skipped += 1
            continue
        encoded = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True, verbose=False
        )
        ids = encoded["input_ids"]
        if not ids:
            continue
        used += 1
        losses, entropies = token_losses(model, ids, start_token, context, batch_size)
        position, syntax = source.classify(encoded["offset_mapping"])
        known = np.isfinite(losses)
        values = {"loss": losses, "entropy": entropies, "position": position, "syntax": syntax}
        values |= {scope: hot_steps(rule, table, ids) for scope, rule in rules.items()}
        values = {key: value[known] for key, value in values.items()} | {"pd": ranks(losses[known])}
        for key, value in values.items():
            columns.setdefault(key, []).append(value)
    if not used:
        raise ValueError(f"files holds no usable Python file ({skipped} are not Python)")
    return _table(used, skipped, {key: np.concatenate(parts) for key, parts in columns.items()})


def _table(files: int, skipped: int, columns: dict[str, np.ndarray]) -> DifficultyTable:
    total = len(columns["loss"])
    groups = np.array(GROUP_OF_POSITION)[columns["position"]]
    splits = [("group", GROUPS, groups), ("position", POSITIONS, columns["position"])]
    splits += [("syntax", SYNTAX, columns["syntax"]), ("all", ("all",), np.zeros(total, dtype=int))]
    rows = []
    for split, names, classes in splits:
        for index, name in enumerate(names):
            chosen = classes == index
            count = int(chosen.sum())
            if count:
                means = {key: float(columns[key][chosen].mean(dtype=np.float64)) for key in ("loss", "pd", "entropy")}
                rows.append(Row(split, name, count, count / total, **means))
    uncertain = columns["entropy"] > UNCERTAIN
    hot = tuple(
        HotSteps(scope, float(columns[scope].mean()), float((columns[scope] & uncertain).mean()))
        for scope in ("line", "block")
    )
    return DifficultyTable(files, skipped, total, tuple(rows), hot)
