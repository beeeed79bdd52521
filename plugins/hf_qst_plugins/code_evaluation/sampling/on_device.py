"""Draws completions of many problems in one batch on a GPU: hundreds of rows, several tokens between two looks at the text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby

import torch

from ..problems import Problem
from .batched import BatchedSampler, Wanted, draw
from .shared_prompts import PromptBatch, read_prompt, read_rows_of_batch, require_shareable, sharing_prompts

STEPS = 16
"""Tokens drawn between two looks at the text of the rows. Rows that ended meanwhile were drawn on for nothing."""


class DeviceSampler(BatchedSampler):
    """`BatchedSampler` for a GPU: every completion is a row, and the tokens stay on the device.

    Each completion has the random numbers that `BatchedSampler` gives it, so it is the same up to rounding. A batch holds
    whole problems and shrinks as their completions end; then the next problems are taken.
    """

    @torch.no_grad()
    def draw(
        self, wanted: Iterable[tuple[Problem, Mapping[Wanted, int]]], rows: int
    ) -> Iterator[tuple[Problem, Wanted, str, int]]:
        """See `BatchedSampler.draw`; `rows` is reached or exceeded by the last problem that is taken in."""
        wanted = iter(wanted)
        with sharing_prompts(self.one.model):
            while True:
                taken: list[tuple[Problem, Mapping[Wanted, int]]] = []
                while sum(len(seeds) for _, seeds in taken) < rows:
                    if (following := next(wanted, None)) is None:
                        break
                    taken.append(following)
                if not taken:
                    return
                yield from self._draw_all(taken)

    def _draw_all(
        self, taken: list[tuple[Problem, Mapping[Wanted, int]]]
    ) -> Iterator[tuple[Problem, Wanted, str, int]]:
        model, device = self.one.model, self.one.model.device
        for problem, seeds in taken:
            for name in {name for name, _ in seeds} - self._processors.keys():
                self._prepare(name, problem)
        encoded = [self.one.encode(problem)["input_ids"][0] for problem, _ in taken]
        if not self._checked:
            require_shareable(model, max((ids.tolist() for ids in encoded), key=len))
            self._checked = True
        # The rows of a setting lie together.
        rows = [(number, one) for number, (_, seeds) in enumerate(taken) for one in seeds]
        rows.sort(key=lambda row: row[1][0])
        prompts, scores = zip(*(read_prompt(model, ids.tolist(), 0) for ids in encoded), strict=True)
        owners = [number for number, _ in rows]
        shared = PromptBatch(prompts, owners, STEPS)
        owner = torch.tensor(owners, device=device)
        scores = torch.cat(scores)[owner]
        # Padded on the left, as `generate` pads prompts of unequal length.
        longest = max(map(len, encoded))
        padded = torch.full((len(taken), longest + self.most), self.one.pad, device=device)
        for number, ids in enumerate(encoded):
            padded[number, longest - len(ids) : longest] = ids
        ids, lengths = padded[owner], torch.tensor([len(ids) for ids in encoded], device=device)[owner]
        numbers = {
            seed: torch.rand(self.most, generator=torch.Generator().manual_seed(seed))
            for seed in {seed for _, seeds in taken for seed in seeds.values()}
        }
        uniforms = torch.stack([numbers[taken[number][1][one]] for number, one in rows]).to(device)
        step = looked = 0
        top_p = self._top_p(rows).to(device)
        while True:
            processed = self._processed(rows, ids[:, : longest + step], scores)
            at = torch.arange(len(rows), device=device)
            ids[:, longest + step] = draw(processed, top_p, at, uniforms[:, step].contiguous())
            step += 1
            if step - looked == STEPS or step == self.most:
                ends: dict[tuple, int] = {}
                kept = []
                for row, tokens in enumerate(ids[:, longest : longest + step].tolist()):
                    number, one = rows[row]
                    problem = taken[number][0]
                    key = (number, *tokens)
                    if key not in ends:
                        ends[key] = self._end(problem, tokens, looked)
                    if used := ends[key]:
                        yield problem, one, self.one.cut(problem, self.one.text(tokens[:used])), used
                    else:
                        kept.append(row)
                if not kept:
                    return
                looked = step
                shared.take(kept, STEPS)
                if len(kept) < len(rows):
                    index = torch.tensor(kept, device=device)
                    ids, uniforms, lengths = ids[index], uniforms[index], lengths[index]
                    rows = [rows[row] for row in kept]
                    top_p = self._top_p(rows).to(device)
            scores = read_rows_of_batch(model, shared, ids[:, longest + step - 1], lengths + (step - 1))

    def _top_p(self, rows: list[tuple[int, Wanted]]) -> torch.Tensor:
        """Of each row, `[rows]`; that of a setting without sampling holds the likeliest token alone."""
        smallest = torch.finfo(torch.float32).tiny
        of_name = {
            name: top_p if self.samplers[name].generate_kwargs["do_sample"] else smallest
            for name, (_, top_p) in self._processors.items()
        }
        return torch.tensor([of_name[name] for _, (name, _) in rows], dtype=torch.float32)

    def _processed(self, rows: list[tuple[int, Wanted]], ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores` `[rows, vocabulary]` after the processors of each row's setting."""
        parts, begin = [], 0
        for name, these in groupby(rows, key=lambda row: row[1][0]):
            end = begin + sum(1 for _ in these)
            part = scores[begin:end]
            for processor in self._processors[name][0]:
                part = processor(ids[begin:end], part)
            parts.append(part)
            begin = end
        return torch.cat(parts)

    def _end(self, problem: Problem, tokens: list[int], looked: int) -> int:
        """Number of tokens with which a completion ends, 0 if it goes on; it did not end within the first `looked`."""

        def ended(count: int) -> bool:
            if tokens[count - 1] in self.one.ends or count == self.most:
                return True
            text = self.one.text(tokens[:count])
            return len(self.one.cut(problem, text)) < len(text)

        new = range(looked + 1, len(tokens) + 1)
        # What is cut off stays cut off: the whole text is looked at first.
        if not ended(len(tokens)) and not any(token in self.one.ends for token in tokens[looked:]):
            return 0
        return next(count for count in new if ended(count))
