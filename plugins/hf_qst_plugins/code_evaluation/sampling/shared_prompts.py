"""Decoding rows of several prompts in one batch. The rows of one prompt share its keys and values.

`generate` repeats the prompt's keys and values for every row, and copies them all when it appends a token. For many rows
of a small model that takes longer than the model itself. Here a prompt's keys and values exist once; each row has storage
of its own only for what follows the prompt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

IMPLEMENTATION = "hf_qst_shared_prompts"
"""The name of `attend` among transformers' attention functions."""


class _RowStorage:
    """Keys and values of the tokens that rows have after their prompt. All rows have the same length at any time."""

    def __init__(self, room: int):
        self.length = 0
        """Tokens after the prompt whose keys and values are kept."""
        self._room = room
        self._rows: dict[int, torch.Tensor] = {}

    def _appended(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of all tokens `[rows, key-value heads, tokens, head size]`, a new one of each row, `[..., 1, ...]`, included."""
        if layer not in self._rows:
            rows, heads, _, size = key.shape
            self._rows[layer] = key.new_empty(2, rows, heads, self._room, size)
        keys, values = self._rows[layer]
        keys[:, :, self.length], values[:, :, self.length] = key[:, :, 0], value[:, :, 0]
        return keys[:, :, : self.length + 1], values[:, :, : self.length + 1]

    def _keep(self, rows: Sequence[int], room: int) -> None:
        """Go on with these rows only, each with room for so many tokens."""
        self._room = room
        for layer, stored in self._rows.items():
            _, _, heads, _, size = stored.shape
            new = stored.new_empty(2, len(rows), heads, room, size)
            new[..., : self.length, :] = stored[:, torch.tensor(rows, device=stored.device), :, : self.length]
            self._rows[layer] = new


class SharedPrompt(_RowStorage):
    """Keys and values of one prompt, and of the tokens that each of its rows has after it.

    Args:
        rows: continuations of the prompt. All have the same length at any time.
        most: tokens of a row at most.
    """

    def __init__(self, rows: int, most: int):
        super().__init__(most)
        self.rows, self.most = rows, most
        self._prompt: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def holds_layers(self) -> bool:
        """Whether an attention layer has read the prompt."""
        return bool(self._prompt)

    def read_prompt(self, layer: int, query, key, value, scaling: float) -> torch.Tensor:
        """Attention within the prompt, whose keys and values are kept.

        Args:
            layer: identifies the attention layer. Layers of a side network can have the numbers of the base's.
            query: `[1, heads, prompt, head size]`; `key` and `value` the same with the key-value heads.

        Returns:
            `[1, heads, prompt, head size]`.
        """
        self._prompt[layer] = key[0].contiguous(), value[0].contiguous()
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)

    def read_rows(self, layer: int, query, key, value, scaling: float) -> torch.Tensor:
        """Attention of one new token in every row over the prompt, the row's earlier tokens and itself.

        Args:
            query: `[rows, heads, 1, head size]`; `key` and `value` the same with the key-value heads.

        Returns:
            `[rows, heads, 1, head size]`.
        """
        rows, heads, _, size = query.shape
        shared = key.shape[1]  # each key-value head serves a group of query heads
        keys, values = self._appended(layer, key, value)
        prompt_keys, prompt_values = self._prompt[layer]

        def of_prompt(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
            """`x` `[rows, shared, group, m]` times `matrix` `[shared, m, n]`, one product for all rows."""
            product = x.transpose(0, 1).reshape(shared, -1, x.shape[-1]) @ matrix
            return product.view(shared, rows, -1, matrix.shape[-1]).transpose(0, 1)

        query = (query * scaling).view(rows, shared, heads // shared, size)
        scores = torch.cat([of_prompt(query, prompt_keys.transpose(1, 2)), query @ keys.transpose(2, 3)], -1)
        weights = scores.softmax(-1)
        split = prompt_keys.shape[1]
        read = of_prompt(weights[..., :split], prompt_values) + weights[..., split:] @ values
        return read.reshape(rows, heads, 1, size)

    def take(self, rows: Sequence[int]) -> None:
        """Go on with these rows only; a row that is named more than once is copied."""
        self._keep(rows, self.most)
        self.rows = len(rows)


class PromptBatch(_RowStorage):
    """Keys and values of several prompts and of the rows after them, in one tensor each.

    For a GPU, where the launches of a loop over prompts take longer than the arithmetic.

    Args:
        prompts: what `read_prompt` gave, on one device.
        owners: the number of the prompt of each row.
        room: tokens that a row can have until the next `take`.
    """

    def __init__(self, prompts: Sequence[SharedPrompt], owners: Sequence[int], room: int):
        read = [prompt._prompt for prompt in prompts]
        lengths = [next(iter(layers.values()))[0].shape[1] for layers in read]
        longest = max(lengths)

        def padded(layer: int, part: int) -> torch.Tensor:
            """`[prompts, key-value heads, longest, head size]`"""
            tensors = (layers[layer][part] for layers in read)
            return torch.stack([F.pad(x, (0, 0, 0, longest - x.shape[1])) for x in tensors])

        self._prompt = {layer: (padded(layer, 0), padded(layer, 1)) for layer in read[0]}
        self._device = next(iter(self._prompt.values()))[0].device
        places = torch.arange(longest, device=self._device)
        self._absent = places >= torch.tensor(lengths, device=self._device)[:, None]
        super().__init__(room)
        self._place(list(owners))

    def _place(self, owners: list[int]) -> None:
        """Give each row a place among the rows of its prompt; prompts without rows are dropped."""
        left = sorted(set(owners))
        if len(left) < len(self._absent):
            index = torch.tensor(left, device=self._device)
            self._absent = self._absent[index]
            self._prompt = {layer: (key[index], value[index]) for layer, (key, value) in self._prompt.items()}
            number = {owner: at for at, owner in enumerate(left)}
            owners = [number[owner] for owner in owners]
        self.owners = owners
        counts = [0] * len(left)
        places = []
        for owner in owners:
            places.append(counts[owner])
            counts[owner] += 1
        self._most = max(counts)
        places = [owner * self._most + place for owner, place in zip(owners, places, strict=True)]
        self._places = torch.tensor(places, device=self._device)
        self._absent_of_rows = self._absent[torch.tensor(owners, device=self._device)][:, None, None]

    def take(self, rows: Sequence[int], room: int) -> None:
        """Go on with these rows only, each with room for so many more tokens."""
        self._keep(rows, self.length + room)
        self._place([self.owners[row] for row in rows])

    def read_rows(self, layer: int, query, key, value, scaling: float) -> torch.Tensor:
        """See `SharedPrompt.read_rows`; the rows are those of all prompts."""
        rows, heads, _, size = query.shape
        shared = key.shape[1]
        keys, values = self._appended(layer, key, value)
        prompt_keys, prompt_values = self._prompt[layer]
        query = (query * scaling).view(rows, shared, heads // shared, size)
        of_prompt = self._of_prompts(query, prompt_keys.transpose(2, 3)).masked_fill(self._absent_of_rows, -torch.inf)
        weights = torch.cat([of_prompt, query @ keys.transpose(2, 3)], -1).softmax(-1)
        split = prompt_keys.shape[2]
        read = self._of_prompts(weights[..., :split], prompt_values) + weights[..., split:] @ values
        return read.reshape(rows, heads, 1, size)

    def _of_prompts(self, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """`x` `[rows, shared, group, m]` times the `[shared, m, n]` of each row's prompt in `matrix`."""
        prompts, shared, m, n = matrix.shape
        group = x.shape[2]
        by_prompt = x.new_zeros(prompts * self._most, shared, group, m).index_copy(0, self._places, x)
        by_prompt = by_prompt.view(prompts, self._most, shared, group, m).transpose(1, 2)
        product = by_prompt.reshape(prompts, shared, self._most * group, m) @ matrix
        product = product.view(prompts, shared, self._most, group, n).transpose(1, 2)
        return product.reshape(prompts * self._most, shared, group, n)[self._places]


def attend(
    module, query, key, value, attention_mask, scaling, shared_prompts: Sequence[SharedPrompt] | PromptBatch, **kwargs
):
    """An attention function of transformers: the prompt of one `SharedPrompt`, or one new token of every row of several.

    Returns:
        `[rows, tokens, heads, head size]`, and None for the weights.

    Raises:
        ValueError: attention other than that over all earlier tokens.
    """
    for name in ("sliding_window", "softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"attention with {name} cannot share prompts; use evaluate")
    if query.shape[2] > 1:
        (prompt,) = shared_prompts
        read = prompt.read_prompt(id(module), query, key, value, scaling)
    elif isinstance(shared_prompts, PromptBatch):
        read = shared_prompts.read_rows(id(module), query, key, value, scaling)
    else:
        sizes = [prompt.rows for prompt in shared_prompts]
        parts = zip(shared_prompts, *(tensor.split(sizes) for tensor in (query, key, value)), strict=True)
        read = torch.cat([prompt.read_rows(id(module), q, k, v, scaling) for prompt, q, k, v in parts])
    return read.transpose(1, 2), None


AttentionInterface.register(IMPLEMENTATION, attend)


@contextlib.contextmanager
def sharing_prompts(model) -> Iterator[None]:
    """Within it, the attention layers of `model` call `attend`, and its forward takes `shared_prompts`."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        config._attn_implementation = before


def read_prompt(model, ids: Sequence[int], most: int) -> tuple[SharedPrompt, torch.Tensor]:
    """A prompt with one row, which can grow by `most` tokens, and the scores of its next token, `[1, vocabulary]`."""
    prompt = SharedPrompt(1, most)
    ids = torch.tensor([ids], device=model.device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=1, shared_prompts=[prompt]).logits
    return prompt, logits[:, -1].float()


def read_rows(model, prompts: Sequence[SharedPrompt], ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
    """Scores `[rows, vocabulary]` after one more token of every row, which has this id and position."""
    ids, positions = (torch.tensor(values, device=model.device)[:, None] for values in (ids, positions))
    logits = model(input_ids=ids, position_ids=positions, use_cache=False, shared_prompts=prompts).logits
    for prompt in prompts:
        prompt.length += 1
    return logits[:, -1].float()


def read_rows_of_batch(model, batch: PromptBatch, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`read_rows` for the ids and positions `[rows]` of a `PromptBatch`, on its device. No host sync."""
    ids, positions = ids[:, None], positions[:, None]
    logits = model(input_ids=ids, position_ids=positions, use_cache=False, shared_prompts=batch).logits
    batch.length += 1
    return logits[:, -1].float()


def require_shareable(model, ids: Sequence[int]) -> None:
    """Refuse a model whose last step over a prompt of several tokens differs from the whole prompt at once.

    Raises:
        ValueError: it reads earlier tokens elsewhere than in transformers' attention functions, such as a state.
    """
    prompt, whole = read_prompt(model, ids, 1)
    if prompt.holds_layers:
        prompt, _ = read_prompt(model, ids[:-1], 1)
        step = read_rows(model, [prompt], ids[-1:], [len(ids) - 1])
        if (step - whole).abs().max() <= torch.finfo(model.dtype).eps ** 0.5 * whole.abs().max():
            return
    raise ValueError(
        f"{type(model).__name__} does not read all earlier tokens by transformers' attention functions, so its prompts "
        "cannot be shared; use evaluate"
    )
