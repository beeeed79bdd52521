"""Draws completions of many problems in one batch, each with random numbers of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from transformers import TopPLogitsWarper

from ..problems import Problem
from .sampler import Sampler
from .shared_prompts import SharedPrompt, read_prompt, read_rows, require_shareable, sharing_prompts

ALLOWED = {
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("max_new_tokens", "logits_processor", "eos_token_id", "pad_token_id", "renormalize_logits"),
}
"""Arguments of `generate` that one batch for many problems can follow: those that change the scores of single rows."""
LIKELIEST = 256
"""Tokens that are looked at first. A sort of the whole vocabulary would take longer than a small model's step."""


def draw(scores: torch.Tensor, top_p: float | torch.Tensor, rows: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Tokens drawn by inversion: the first of the sorted tokens whose cumulative probability exceeds the random number.

    Args:
        scores: `[n, vocabulary]`, -inf where a token is excluded.
        top_p: each row's tokens are the likeliest with at least this probability together; 1 for all. A number, or one
            for each row `[n]`.
        rows, uniform: the row of `scores` and the number in [0, 1) of each draw, `[draws]` each.

    Returns:
        Token ids, `[draws]`.
    """
    chosen = torch.empty(len(rows), dtype=torch.long, device=scores.device)
    normalizer = scores.logsumexp(-1, keepdim=True)
    top_p = torch.as_tensor(top_p, dtype=scores.dtype, device=scores.device).expand(len(scores))
    count = min(LIKELIEST, scores.shape[1])
    top, ids = scores.topk(count)
    cumulative = (top - normalizer).exp().cumsum(-1)
    # The whole nucleus is among the likeliest if these hold its probability, or all tokens that are not excluded.
    whole = (cumulative[:, -1] >= top_p) | (top[:, -1] == -torch.inf) | (count == scores.shape[1])
    for these, all_tokens in ((whole[rows], False), (~whole[rows], True)):
        at = these.nonzero()[:, 0]
        if not len(at):
            continue
        row = rows[at]
        if all_tokens:
            some, row = row.unique(return_inverse=True)
            part_top, part_ids = scores[some].sort(descending=True)
            probabilities, mass = (part_top - normalizer[some]).exp(), top_p[some]
        else:
            part_ids, probabilities, mass = ids, (top - normalizer).exp(), top_p
        before = probabilities.cumsum(-1) - probabilities
        kept = torch.where(before < mass[:, None], probabilities, 0.0).cumsum(-1)
        # Rounding must not reach the total: beyond it lie only tokens of probability 0.
        target = torch.minimum(uniform[at] * kept[row, -1], torch.nextafter(kept[row, -1], kept.new_zeros(())))
        index = torch.searchsorted(kept[row], target[:, None], right=True)
        chosen[at] = part_ids[row].gather(1, index)[:, 0]
    return chosen


Wanted = tuple[str, int]
"""A completion of a problem: the setting it is drawn with, and its number."""


@dataclass
class _Group:
    """One problem's unfinished completions. Those that are equal so far are one row, whatever their settings.

    Args:
        problem: what is completed.
        prompt: ids of the prompt.
        uniforms: random numbers of each completion, one for each token.
        shared: keys and values.
        samples: the completions that each row stands for.
        rows: the ids after the prompt of each row.
    """

    problem: Problem
    prompt: list[int]
    uniforms: dict[Wanted, list[float]]
    shared: SharedPrompt
    samples: list[list[Wanted]]
    rows: list[list[int]] = field(default_factory=lambda: [[]])

    def append(
        self, tokens: Mapping[Wanted, int], ended: Callable[[list[int]], bool]
    ) -> list[tuple[Wanted, list[int]]]:
        """Append each completion's next token; the completions that end with it, and their ids."""
        finished = []
        rows, samples, parents = [], [], []
        for row, (ids, these) in enumerate(zip(self.rows, self.samples, strict=True)):
            by_token: dict[int, list[Wanted]] = {}
            for one in these:
                by_token.setdefault(tokens[one], []).append(one)
            for token, equal in by_token.items():
                longer = [*ids, token]
                if ended(longer):
                    finished += [(one, longer) for one in equal]
                else:
                    rows.append(longer)
                    samples.append(equal)
                    parents.append(row)
        if rows and parents != list(range(len(self.rows))):
            self.shared.take(parents)
        self.rows, self.samples = rows, samples
        return finished


class BatchedSampler:
    """Draws completions of many problems with several settings at once.

    A batch of one problem shrinks to its longest completions, and a step for one row takes nearly as long as one for
    fifteen. So the batch is filled up with the next problem's. Completions of a problem are one row while they are equal,
    also those of different settings. Each completion has random numbers of its own, so it does not depend on the others,
    up to the rounding of sums whose order depends on the batch. With equal seeds, settings that choose the same token give the same completion.

    Args:
        samplers: one for each setting by its name; they differ in their `generate_kwargs` only.

    Raises:
        ValueError: an argument of `generate` that concerns more than the scores of a row; when it draws, a model whose
            prompts cannot be shared.
    """

    def __init__(self, samplers: Mapping[str, Sampler]):
        for name, sampler in samplers.items():
            if other := sorted(sampler.generate_kwargs.keys() - ALLOWED):
                raise ValueError(
                    f"generate_kwargs of {name!r} must not hold {other[0]!r}: problems are drawn together with "
                    f"{', '.join(sorted(ALLOWED))} only"
                )
        limits = {sampler.generate_kwargs["max_new_tokens"] for sampler in samplers.values()}
        if len(limits) > 1:
            raise ValueError(
                f"generate_kwargs must hold the same max_new_tokens in every setting, got {sorted(limits)}"
            )
        (self.most,) = limits
        self.samplers = samplers
        self.one = next(iter(samplers.values()))
        self._processors: dict[str, tuple[list, float]] = {}
        self._checked = False

    def _prepare(self, name: str, problem: Problem) -> None:
        """Keep what `generate` does to the scores: its processors, and the top_p of a final `TopPLogitsWarper`."""
        found: list = []

        def instead_of_sampling(model, input_ids, logits_processor, **kwargs):
            found.extend(logits_processor)
            return input_ids

        sampler = self.samplers[name]
        kwargs = {**sampler.generate_kwargs, "pad_token_id": sampler.pad, "eos_token_id": sampler.ends or None}
        sampler.model.generate(**sampler.encode(problem), custom_generate=instead_of_sampling, **kwargs)
        nucleus = bool(found) and type(found[-1]) is TopPLogitsWarper and found[-1].min_tokens_to_keep == 1
        self._processors[name] = (found[:-1], found[-1].top_p) if nucleus else (found, 1.0)

    @torch.no_grad()
    def draw(
        self, wanted: Iterable[tuple[Problem, Mapping[Wanted, int]]], rows: int
    ) -> Iterator[tuple[Problem, Wanted, str, int]]:
        """Problem, completion, its text and its number of tokens, of every completion as it ends.

        Args:
            wanted: pairs of a problem and the seed of each completion of it.
            rows: rows in the batch. The next problem is taken in while there are fewer, with half of its completions
                counted as rows of their own from the start.
        """
        wanted = iter(wanted)
        groups: list[_Group] = []
        with sharing_prompts(self.one.model):
            while True:
                while sum(max(len(g.rows), sum(map(len, g.samples)) // 2) for g in groups) < rows:
                    if (following := next(wanted, None)) is None:
                        break
                    group, scores = self._begin(*following)
                    yield from self._extend([group], scores)
                    groups += [group] if group.rows else []
                if not groups:
                    return
                last = [row[-1] for group in groups for row in group.rows]
                at = [len(group.prompt) + len(row) - 1 for group in groups for row in group.rows]
                scores = read_rows(self.one.model, [group.shared for group in groups], last, at)
                yield from self._extend(groups, scores)
                groups = [group for group in groups if group.rows]

    def _begin(self, problem: Problem, seeds: Mapping[Wanted, int]) -> tuple[_Group, torch.Tensor]:
        for name in {name for name, _ in seeds} - self._processors.keys():
            self._prepare(name, problem)
        ids = self.one.encode(problem)["input_ids"][0].tolist()
        if not self._checked and len(ids) > 2:
            require_shareable(self.one.model, ids)
            self._checked = True
        uniforms = {}
        for one, seed in seeds.items():
            uniforms[one] = torch.rand(self.most, generator=torch.Generator().manual_seed(seed)).tolist()
        shared, scores = read_prompt(self.one.model, ids, self.most)
        return _Group(problem, ids, uniforms, shared, [list(seeds)]), scores

    def _extend(self, groups: list[_Group], scores: torch.Tensor) -> Iterator[tuple[Problem, Wanted, str, int]]:
        """Draw the next token of every completion; those that end."""
        rows = [(group, row) for group in groups for row in range(len(group.rows))]
        longest = max(len(group.prompt) + len(group.rows[0]) for group in groups)
        # Padded on the left, as `generate` pads prompts of unequal length.
        ids = [[self.one.pad] * longest + group.prompt + group.rows[row] for group, row in rows]
        ids = torch.tensor([row[-longest:] for row in ids], device=scores.device)
        draws: dict[str, list[tuple[int, _Group, Wanted]]] = {}
        for index, (group, row) in enumerate(rows):
            for one in group.samples[row]:
                draws.setdefault(one[0], []).append((index, group, one))
        tokens: dict[int, dict[Wanted, int]] = {id(group): {} for group in groups}
        for name, these in draws.items():
            drawn = self._next_tokens(
                name,
                ids,
                scores,
                [index for index, _, _ in these],
                [group.uniforms[one][len(group.rows[0])] for _, group, one in these],
            )
            for token, (_, group, one) in zip(drawn, these, strict=True):
                tokens[id(group)][one] = token
        for group in groups:

            def ended(row: list[int], group: _Group = group) -> bool:
                if row[-1] in self.one.ends or len(row) == self.most:
                    return True
                text = self.one.text(row)
                return len(self.one.cut(group.problem, text)) < len(text)

            for one, row in group.append(tokens[id(group)], ended):
                yield group.problem, one, self.one.cut(group.problem, self.one.text(row)), len(row)

    def _next_tokens(self, name: str, ids, scores, rows: list[int], uniform: list[float]) -> list[int]:
        """One token of setting `name` for each of `rows`, with the random numbers `uniform`."""
        own, at = torch.tensor(rows, device=scores.device).unique(return_inverse=True)
        scores, ids = scores[own], ids[own]
        processors, top_p = self._processors[name]
        for processor in processors:
            scores = processor(ids, scores)
        if not self.samplers[name].generate_kwargs["do_sample"]:
            return scores.argmax(-1)[at].tolist()
        return draw(scores, top_p, at, torch.tensor(uniform, device=scores.device)).tolist()
