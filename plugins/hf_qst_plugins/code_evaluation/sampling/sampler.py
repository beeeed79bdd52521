"""Draws completions of a problem from a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import GenerationConfig, StoppingCriteria

from hf_qst.tuner.config import is_count

from ..problems import Problem
from .completion import MODULE_STOPS, WHITESPACE, truncate
from .generated_text import GeneratedText

GENERATE_DEFAULTS = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 0, "max_new_tokens": 256}
"""Defaults for `generate`. All are passed, so a checkpoint's own values and transformers' top_k=50 have no effect."""
NOT_OURS = {
    **dict.fromkeys(("input_ids", "inputs", "inputs_embeds", "attention_mask"), "the prompts come from problems"),
    "num_return_sequences": "set samples and batch_size",
    "return_dict_in_generate": "only the rows of tokens are read",
}
"""Arguments of `generate` that the evaluation sets itself, each with what the caller should do instead."""


def checked_generate_kwargs(given: Mapping | None) -> dict:
    """The arguments for `generate`: `given`, then the values of its `generation_config`, then `GENERATE_DEFAULTS`.

    Raises:
        ValueError: not a mapping, an argument that the evaluation sets itself, or an invalid `max_new_tokens`.
    """
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"generate_kwargs must be a mapping of arguments of generate, got {type(given).__name__}")
    arguments = dict(given or {})
    for name, instead in NOT_OURS.items():
        value = arguments.pop(name, None)
        if value is not None and value is not False:
            raise ValueError(f"generate_kwargs must not hold {name!r}, got {value!r}: {instead}")
    config = arguments.pop("generation_config", None)
    if config is not None:
        known = vars(GenerationConfig()).keys() - NOT_OURS.keys() - {"transformers_version"}
        values = {name: value for name, value in config.to_dict().items() if value is not None and name in known}
        arguments = {**{name: value for name, value in values.items() if not name.startswith("_")}, **arguments}
    length = arguments.pop("max_length", None)
    if length is not None and "max_new_tokens" not in arguments:
        raise ValueError(f"generate_kwargs must give the length as max_new_tokens, got max_length={length!r}")
    kwargs = {**GENERATE_DEFAULTS, **arguments}
    new = kwargs["max_new_tokens"]
    if not is_count(new):
        raise ValueError(f"generate_kwargs['max_new_tokens'] must be a whole number of at least 1, got {new!r}")
    return kwargs


def _token_ids(value: object) -> list[int]:
    """A list of token ids from any form that `generate` accepts: None, an id, a list or a tensor."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [int(value)]


def _pad_and_ends(model, tokenizer, kwargs: Mapping) -> tuple[int | None, list[int]]:
    """Padding token and end tokens: from `kwargs`, else from the model, else from the tokenizer."""
    config = getattr(model, "generation_config", None)
    of_model = _token_ids(getattr(config, "eos_token_id", None))
    ends = _token_ids(kwargs.get("eos_token_id")) or of_model or _token_ids(tokenizer.eos_token_id)
    pads = (kwargs.get("pad_token_id"), tokenizer.pad_token_id, getattr(config, "pad_token_id", None), *ends)
    return next((pad for pad in pads if pad is not None), None), ends


class _Finished(StoppingCriteria):
    """Ends a row when its completion would be truncated, or when one of the caller's criteria ends it.

    Args:
        text: function from a list of generated ids to their text.
        prompt_length: number of prompt tokens.
        ends: function that says whether this text ends its row.
        others: the caller's criteria.
    """

    def __init__(self, text, prompt_length: int, ends, others: Sequence):
        self.text, self.prompt_length, self.ends, self.others = text, prompt_length, ends, others
        self.lengths: dict[int, int] = {}
        """Tokens of each row when it ended here; meaningless for beam search, which moves rows."""

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        """[batch] bool, for `input_ids` [batch, length]."""
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for other in self.others:
            done |= torch.as_tensor(other(input_ids, scores, **kwargs), device=done.device)
        ended = done.tolist()
        for row, ids in enumerate(input_ids[:, self.prompt_length :].tolist()):
            ended[row] = ended[row] or self.ends(self.text(ids))
            if ended[row]:
                self.lengths.setdefault(row, len(ids))
        return torch.tensor(ended, device=input_ids.device)


class Sampler:
    """Draws completions of one problem; equal seeds give equal completions.

    Args:
        model, tokenizer: a causal language model and its tokenizer.
        generate_kwargs: see `checked_generate_kwargs`. The end tokens are their `eos_token_id`, else those of the model's
            generation config, else the tokenizer's.
        stop_strings: texts that end a completion; None for `completion.MODULE_STOPS` if a problem has no signature.
        strip_prompt: remove the whitespace at a prompt's end. Many tokenizers merge a line break with the indentation
            after it, so the model has never seen a text that ends in a line break.
        prefix: text before each prompt that is not part of the program, such as a begin-of-text token.
    """

    def __init__(self, model, tokenizer, generate_kwargs=None, stop_strings=None, strip_prompt=True, prefix=""):
        self.model, self.tokenizer = model, tokenizer
        self.generate_kwargs = checked_generate_kwargs(generate_kwargs)
        self.pad, self.ends = _pad_and_ends(model, tokenizer, self.generate_kwargs)
        self.text = GeneratedText(tokenizer)
        self.stop_strings = None if stop_strings is None else tuple(stop_strings)
        self.strip_prompt, self.prefix = strip_prompt, prefix

    def prompt(self, problem: Problem) -> str:
        """The text that is completed; the program starts with it."""
        return problem.prompt.rstrip(WHITESPACE) if self.strip_prompt else problem.prompt

    def encode(self, problem: Problem) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask` of the prompt, [1, length] each.

        Raises:
            ValueError: the prompt is empty, or prompt and `max_new_tokens` exceed the model's positions.
        """
        encoded = self.tokenizer(self.prefix + self.prompt(problem), return_tensors="pt")
        length, new = encoded["input_ids"].shape[1], self.generate_kwargs["max_new_tokens"]
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if length == 0:
            raise ValueError(f"the prompt of task {problem.task_id!r} has no token")
        if positions is not None and length + new > positions:
            raise ValueError(
                f"task {problem.task_id!r} has {length} prompt tokens, and with max_new_tokens={new} that is more than "
                f"the model's {positions} positions; give a max_new_tokens of at most {positions - length}"
            )
        return {name: encoded[name].to(self.model.device) for name in ("input_ids", "attention_mask")}

    def cut(self, problem: Problem, text: str) -> str:
        """`text` truncated by the rule of the problem's format."""
        body = problem.entry_point is not None
        stops = self.stop_strings if self.stop_strings is not None else () if body else MODULE_STOPS
        return truncate(text, stops, body, self.prompt(problem).endswith(("\n", "\r")))

    @torch.no_grad()
    def draw(self, problem: Problem, count: int, seed: int) -> list[tuple[str, int]]:
        """`count` pairs of a completion and its number of generated tokens, an end-of-text token included."""
        encoded = self.encode(problem)
        length = encoded["input_ids"].shape[1]
        kwargs = {**self.generate_kwargs, "pad_token_id": self.pad, "eos_token_id": self.ends or None}
        others, stops = kwargs.pop("stopping_criteria", None) or (), kwargs.pop("stop_strings", None) or ()
        stops = (stops,) if isinstance(stops, str) else stops

        def ends(text: str) -> bool:
            return len(self.cut(problem, text)) < len(text) or any(stop in text for stop in stops)

        finished = _Finished(self.text, length, ends, others)
        device = self.model.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            rows = self.model.generate(
                **encoded,
                num_return_sequences=count,
                return_dict_in_generate=False,
                stopping_criteria=[finished],
                **kwargs,
            )
        beams = kwargs.get("num_beams") or getattr(self.model.generation_config, "num_beams", None) or 1
        drawn = []
        for row, ids in enumerate(rows[:, length:].tolist()):
            # Padding follows a row's end token. The end token itself was generated.
            used = next((at for at, number in enumerate(ids, 1) if number in self.ends), len(ids))
            if beams == 1:
                used = min(used, finished.lengths.get(row, used))
            else:
                used = next((at for at in range(1, used) if ends(self.text(ids[:at]))), used)
            drawn.append((self.cut(problem, self.text(ids[:used])), used))
        return drawn
