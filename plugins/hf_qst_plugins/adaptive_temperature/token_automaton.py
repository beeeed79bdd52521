"""A rule over a vocabulary as tables, which give the rule's state after rows of ids without text or loops over rows.

Each token is a function from states to states, and a window of tokens is the composition of these functions. Composition
is associative, so a window of W tokens needs log2(W) gathers.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from hf_qst.tuner.config import is_count
from hf_qst_plugins.adaptive_temperature.rules import TokenRule
from hf_qst_plugins.adaptive_temperature.vocabulary import VocabularyTable

DEPENDS = 2
"""In `_verdict`: tokens before the last one decide whether the next token is hot."""


class _BeforeText:
    """The state before a text if the tokenizer adds a leading space to it."""


class DeviceCopies:
    """A constant tensor with one copy per device, made on first use."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor
        self._copies: dict[torch.device, torch.Tensor] = {}

    def on(self, device: torch.device) -> torch.Tensor:
        if device == self.tensor.device:
            return self.tensor
        if device not in self._copies:
            self._copies[device] = self.tensor.to(device)
        return self._copies[device]

    def __getstate__(self) -> dict:
        return {"tensor": self.tensor, "_copies": {}}  # another process may not have the devices


class TokenAutomaton:
    """The states of a rule after rows of token ids.

    It reads only the last `window` ids of a row, so the cost does not grow with the row. The text before the window
    counts as the middle of a line.

    Args:
        table (`VocabularyTable`): the vocabulary.
        rule (`TokenRule`): the rule.
        window (`int`): number of ids to look back, a power of two.

    Raises:
        ValueError: `window` is not a power of two, or no sequence of tokens makes the rule hot.
    """

    def __init__(self, table: VocabularyTable, rule: TokenRule, window: int):
        if not is_count(window) or window & (window - 1):
            raise ValueError(f"window must be a power of two, got {window!r}")
        self.window = window
        self.state_values, transitions = _tabulate(table, rule)
        self._unknown = len(table)
        self._before_text = len(table) + 1
        self._inside = self.state_values.index(rule.inside)
        self.hot_states = [bool(rule.hot(rule.start if value is _BeforeText else value)) for value in self.state_values]
        self._hot = tuple(self.hot_states)
        self._first = int(transitions[self._before_text, 0])
        if not any(self.hot_states):
            raise ValueError(
                "the rule would never fire: no tokens of this vocabulary lead to one of its hot states (for "
                'scope="reference" there must be a newline token and one of exactly four spaces or a tab)'
            )
        hot = torch.tensor(self.hot_states)[transitions[: self._unknown + 1].long()]
        decided = hot.all(-1) | ~hot.any(-1)
        self._verdict = hot[:, 0].to(torch.uint8).masked_fill(~decided, DEPENDS).numpy()
        # Few functions are different. Tokens with the same function are of one kind.
        numbers: dict[bytes, int] = {}
        functions = map(bytes, transitions[: self._unknown + 1].tolist())
        self._kinds = np.array([numbers.setdefault(function, len(numbers)) for function in functions], np.int32)
        self._functions = list(numbers)
        self._steps: dict[tuple, tuple] = {}
        self._transitions = DeviceCopies(transitions)

    def is_hot(self, ids: Sequence[int]) -> bool:
        """Whether the token after `ids` is hot; `ids` is a whole row of integers or its last `window`."""
        window = np.asarray(ids[-self.window :], np.int64)
        return self._is_hot_behind(self._kinds.take(window, mode="clip"), len(ids) < self.window)

    def hot_rows(self, input_ids: torch.Tensor) -> np.ndarray:
        """1 for each row whose next token is hot, else 0: uint8 `[batch]` from `[batch, length]` on the CPU.

        The last token nearly always decides. Only the other rows are read further back.
        """
        ids = input_ids.numpy()
        if ids.shape[1] == 0:
            return np.full(len(ids), self.is_hot(()), np.uint8)
        # `clip`: ids that the table does not know have the last entry.
        hot = self._verdict.take(ids[:, -1], mode="clip")
        if DEPENDS in hot.tobytes():
            rows = (hot == DEPENDS).nonzero()[0]
            kinds = self._kinds.take(ids[rows, -self.window :], mode="clip")
            begins = ids.shape[1] < self.window
            hot[rows] = [self._is_hot_behind(row, begins) for row in kinds]
        return hot

    def _is_hot_behind(self, kinds: np.ndarray, begins: bool) -> bool:
        """Whether the token after tokens of these kinds is hot; with `begins`, the text starts with them.

        Reads from the end. `hot` says for each state before a token whether it leads to a hot one; the loop stops when
        that is the same for all states.
        """
        hot = self._hot
        for kind in memoryview(kinds[::-1]):
            hot = self._steps.get((hot, kind)) or self._step(hot, kind)
            if len(hot) == 1:
                return hot[0]
        return hot[self._first if begins else self._inside]

    def _step(self, hot: tuple[bool, ...], kind: int) -> tuple[bool, ...]:
        """`hot` one token earlier, cached; a single value if it is the same for all states."""
        before = tuple(hot[state] for state in self._functions[kind])
        self._steps[hot, kind] = before = before[:1] if len(set(before)) == 1 else before
        return before

    def states(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Index into `state_values` of each row's state: int64 `[batch]` from `[batch, length]`. No host sync."""
        ids = input_ids[:, -self.window :].clamp(max=self._unknown)
        ids = F.pad(ids, (self.window - ids.shape[1], 0), value=self._before_text)
        return self._compose(ids)

    def states_of_windows(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Like `states`, for rows whose text may be shorter than the window. No host sync.

        Args:
            ids (`torch.Tensor` `[batch, window]`): the last ids of each row; the values before a text are ignored.
            lengths (`torch.Tensor` `[batch]`): number of ids in each text.
        """
        ids = torch.where(ids < 0, self._unknown, ids.clamp(max=self._unknown))
        places = torch.arange(self.window, 0, -1, device=ids.device)
        return self._compose(torch.where(places <= lengths.unsqueeze(-1), ids, self._before_text))

    def states_along(self, ids: torch.Tensor) -> torch.Tensor:
        """The state before each token t of one text, `states(ids[:t])`: int64 `[length]` from `[length]`."""
        padded = F.pad(ids[:-1].clamp(max=self._unknown), (self.window, 0), value=self._before_text)
        windows = padded.unfold(0, self.window, 1)
        return torch.cat([self._compose(part) for part in windows.split(4096)])

    def _compose(self, ids: torch.Tensor) -> torch.Tensor:
        functions = self._transitions.on(ids.device)[ids].long()  # [batch, window, states]
        while functions.shape[1] > 1:
            functions = functions[:, 1::2].gather(2, functions[:, 0::2])
        return functions[:, 0, self._inside]


def _tabulate(table: VocabularyTable, rule: TokenRule) -> tuple[list[Hashable], torch.Tensor]:
    """The states, and the next state for each token and state, uint8 `[vocabulary + 2, states]`.

    The last two rows are for ids that the table does not know (content) and for the position before a text.
    """
    start = _BeforeText if table.adds_leading_space else rule.start

    def after(state: Hashable, text: str) -> Hashable:
        if state is _BeforeText:
            return rule.after(rule.start, text.removeprefix(" ")) if text else state
        return rule.after(state, text)

    reduced = [None if text is None else rule.reduce(text) for text in [*table.texts, "x", None]]
    kinds_of_text = dict.fromkeys(text for text in reduced if text is not None)
    states = list(dict.fromkeys([start, rule.inside]))
    index = {state: i for i, state in enumerate(states)}
    functions: dict[str | None, list[int]] = {text: [] for text in kinds_of_text}
    for state in states:  # grows during the loop
        for text, targets in functions.items():
            target = after(state, text)
            if target not in index:
                index[target] = len(states)
                states.append(target)
            targets.append(index[target])
    if len(states) > 256:
        raise ValueError(f"the rule has {len(states)} states on this vocabulary, at most 256 are supported")
    functions[None] = [index[start]] * len(states)
    return states, torch.tensor([functions[text] for text in reduced], dtype=torch.uint8)
