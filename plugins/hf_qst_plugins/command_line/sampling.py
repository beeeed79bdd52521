"""Sampling options, and the temperature of every token."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_qst import AdaptiveTemperatureLogitsProcessor
from hf_qst_plugins.code_evaluation import GENERATE_DEFAULTS

from .arguments import Arguments
from .errors import UsageError


@dataclass
class SamplingOptions:
    """How tokens are drawn.

    Args:
        temperature: of every token, 0 for greedy decoding; not with --adaptive_temperature.
        top_p: the least set of tokens with this probability is drawn from.
        top_k: the most likely tokens that are drawn from; 0 for all.
        max_new_tokens: the most tokens of a completion.
    """

    temperature: float = GENERATE_DEFAULTS["temperature"]
    top_p: float = GENERATE_DEFAULTS["top_p"]
    top_k: int = GENERATE_DEFAULTS["top_k"]
    max_new_tokens: int = GENERATE_DEFAULTS["max_new_tokens"]


def add_sampling(arguments: Arguments) -> None:
    """Sampling options, and those of the adaptive temperature below `--adaptive`."""
    arguments.add(SamplingOptions)
    arguments.flag("adaptive_temperature", "One temperature where a block of code starts, another elsewhere.")
    skip = {"tokenizer", "rule", "max_batch_size"}
    arguments.add(AdaptiveTemperatureLogitsProcessor, skip=skip, prefix="adaptive")


def processor_of(options, tokenizer) -> AdaptiveTemperatureLogitsProcessor | None:
    """The processor of `--adaptive_temperature`; None without.

    Raises:
        UsageError: options that contradict each other, or that the processor refuses.
    """
    details = sorted(name for name in options.given if name.startswith("adaptive."))
    if not options.adaptive_temperature:
        if details:
            raise UsageError(details[0], "it needs --adaptive_temperature")
        return None
    if "temperature" in options.given:
        raise UsageError("temperature", "--adaptive_temperature has its own: --adaptive.temperature")
    return options.build(AdaptiveTemperatureLogitsProcessor, "adaptive_temperature", tokenizer=tokenizer)


def generate_arguments(options, processor) -> dict:
    """Arguments of `model.generate`.

    Raises:
        UsageError: a number is out of range.
    """
    for name, least in (("temperature", 0), ("top_p", 0), ("top_k", 0), ("max_new_tokens", 1)):
        if getattr(options, name) < least:
            raise UsageError(name, f"it must be at least {least}, got {getattr(options, name)}")
    if processor is None and options.temperature == 0:
        return {"do_sample": False, "max_new_tokens": options.max_new_tokens}
    settings = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": options.top_k}
    settings["max_new_tokens"] = options.max_new_tokens
    return settings if processor is None else {**settings, "temperature": 1.0, "logits_processor": [processor]}


def temperatures(processor, ids: torch.Tensor, prompt_length: int) -> list[float]:
    """The temperature at which each token after the prompt was drawn, read off the rule again.

    Args:
        processor ([`AdaptiveTemperatureLogitsProcessor`])
        ids (`torch.Tensor` [length]): prompt and completion.
        prompt_length (`int`)
    """
    found = []
    for end in range(prompt_length, len(ids)):
        scores = torch.ones(1, 1)
        found.append(1.0 / float(processor(ids[None, :end], scores)[0, 0]))
    return found
