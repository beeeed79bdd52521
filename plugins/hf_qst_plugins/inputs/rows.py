"""Rows of tokens with labels, and the mean loss of a model over them.

Plain text is packed into blocks of equal length. Conversations and pairs of prompt and completion are a row each, made of
the tokens, and with the labels, that TRL's `SFTTrainer` gives them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

IGNORED = -100
"""Label of a token that is not learned."""


def blocks(ids: np.ndarray, length: int, limit: int | None = None) -> torch.Tensor:
    """`ids` [n] cut into rows: [n // length, length] int64, what is left at the end dropped.

    `limit` keeps that many rows, evenly spaced over all of them, so that a few rows still see every part.
    """
    if length < 2:
        raise ValueError(f"length={length!r} is too short; a block needs at least 2 tokens, one to predict the other")
    rows = torch.from_numpy(np.asarray(ids[: len(ids) // length * length], dtype=np.int64)).view(-1, length)
    if limit is not None and limit < len(rows):
        rows = rows[torch.linspace(0, len(rows) - 1, limit).round().long()]
    return rows


class BlockDataset(torch.utils.data.Dataset):
    """Blocks [n, length] as a dataset: each item {"input_ids": [length], "labels": [length]}, as `Trainer` takes."""

    def __init__(self, rows: torch.Tensor):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class Collator:
    """Pads rows of `input_ids` and `labels` on the right; rows of one length get no attention mask.

    Args:
        pad_token_id (`int`): id that fills `input_ids`; labels are filled with -100.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, items: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        rows = [{name: torch.as_tensor(item[name]) for name in ("input_ids", "labels")} for item in items]
        fill = {"input_ids": self.pad_token_id, "labels": IGNORED}
        batch = {
            name: torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
            for name, value in fill.items()
        }
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        if lengths.min() < lengths.max():
            batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        return batch


def token_rows(examples: Iterable[Mapping], tokenizer, length: int, progress: bool = True):
    """The rows of examples that all have the same form.

    Args:
        examples: each with `text`; `messages` (a conversation, to which the tokenizer's chat template is applied); or
            `prompt` and `completion`, both text or both messages, of which the completion alone is learned.
        tokenizer: of the model.
        length (`int`): tokens of a block of text, and the most of another row.
        progress (`bool`): whether to show a progress bar.

    Returns:
        [`BlockDataset`] for text, else a list of {"input_ids", "labels"}.

    Raises:
        ValueError: a form that is none of these, a conversation and a tokenizer without a chat template, or no
            end-of-text token.
    """
    examples = list(examples)
    if tokenizer.eos_token is None:
        raise ValueError(f"the tokenizer of {tokenizer.name_or_path!r} has no eos_token; one is needed between texts")
    bar = tqdm(examples, "tokenizing", unit="example", delay=1, disable=not progress, leave=False)
    forms = {_form(example) for example in examples}
    if len(forms) > 1:
        raise ValueError(f"the examples have different forms: {', '.join(sorted(forms))}; give them one")
    if forms == {"text"}:
        # Text that spells a special token is text about it, not the token: hence split_special_tokens. verbose=False: a
        # text longer than the model's context is no mistake, it is cut into blocks.
        plain = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        parts = [np.array([*tokenizer(e["text"], **plain)["input_ids"], tokenizer.eos_token_id]) for e in bar]
        return BlockDataset(blocks(np.concatenate(parts), length))
    rows = [{name: ids[:length] for name, ids in _row(example, tokenizer).items()} for example in bar]
    # A prompt alone that fills the row teaches nothing.
    return [row for row in rows if any(label != IGNORED for label in row["labels"])]


def _form(example: Mapping) -> str:
    for form in (("text",), ("messages",), ("prompt", "completion")):
        if all(example.get(name) is not None for name in form):
            return " and ".join(form)
    raise ValueError(
        f"an example has the fields {', '.join(sorted(example)) or 'none'}; it needs text, messages, or prompt and completion"
    )


def _row(example: Mapping, tokenizer) -> dict[str, list[int]]:
    if "messages" in example:
        ids = _conversation(tokenizer, example["messages"], example)
        return {"input_ids": ids, "labels": list(ids)}
    prompt, completion = example["prompt"], example["completion"]
    if isinstance(prompt, str):
        end = "" if completion.endswith(tokenizer.eos_token) else tokenizer.eos_token
        before, ids = (tokenizer(text)["input_ids"] for text in (prompt, prompt + completion + end))
    else:
        before = _conversation(tokenizer, prompt, example, add_generation_prompt=True)
        ids = _conversation(tokenizer, [*prompt, *completion], example)
    # Tokens may merge over the border, and a template may render a prompt that is answered in another way.
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, ids, strict=False)))
    return {"input_ids": ids, "labels": [IGNORED] * shared + ids[shared:]}


def _conversation(tokenizer, messages, example: Mapping, **arguments) -> list[int]:
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template, which messages need; give text instead"
        )
    rendered = tokenizer.apply_chat_template(messages, tools=example.get("tools"), return_dict=True, **arguments)
    return list(rendered["input_ids"])


@torch.no_grad()
def held_out_loss(model, rows, batch_size: int = 8) -> float:
    """Mean negative log likelihood, in nats per token with a label, of each from those before it.

    The sum over all of them is divided by their number once, in float64: a mean of batch means would weigh a short last
    batch too much.

    Args:
        model: a causal language model; it is in eval mode meanwhile.
        rows: token ids `torch.Tensor` [n, length], or a sequence of {"input_ids", "labels"}.
        batch_size: rows that are run at once.
    """
    if len(rows) == 0:
        raise ValueError("rows is empty; give at least one block, [n, length]")
    items = BlockDataset(rows) if isinstance(rows, torch.Tensor) else rows
    device, training, collate = next(model.parameters()).device, model.training, Collator(0)
    model.eval()
    total, count = 0.0, 0
    starts = range(0, len(items), batch_size)
    for start in tqdm(starts, desc="held-out loss", unit="batch", delay=5, leave=False):
        batch = collate([items[i] for i in range(start, min(start + batch_size, len(items)))])
        labels = batch.pop("labels")[:, 1:].flatten().to(device)
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        logits = model(**batch, use_cache=False).logits[:, :-1].float()
        losses = F.cross_entropy(logits.flatten(0, 1), labels, reduction="none", ignore_index=IGNORED)
        total, count = total + losses.double().sum().item(), count + int((labels != IGNORED).sum())
    model.train(training)
    return total / count
