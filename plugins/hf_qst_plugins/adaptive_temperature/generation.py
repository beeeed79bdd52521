"""Adaptive temperature in `generate`: keyword arguments for one call, or installation on a model or pipeline."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Mapping
from typing import Any

from transformers import LogitsProcessorList

from hf_qst_plugins.adaptive_temperature.processor import (
    AdaptiveTemperatureLogitsProcessor,
    LastTokenTemperatureLogitsProcessor,
)

logger = logging.getLogger(__name__)

SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 0.95, "num_beams": 1}
"""The paper's settings besides the two temperatures. All are passed always: transformers multiplies `temperature` with
that of the processor, and would otherwise take a checkpoint's own `temperature` and `top_k=50`."""

PROCESSOR_OPTIONS = ("block_temperature", "temperature", "scope", "language", "region", "rule", "max_batch_size")


def _warn_greedy() -> None:
    logger.warning(
        "do_sample=False: the adaptive temperature does nothing, greedy decoding takes the largest score whatever the "
        "temperature; pass do_sample=True"
    )


def adaptive_generate_kwargs(tokenizer, preset: str = "default", **over) -> dict[str, Any]:
    """The keyword arguments with which `model.generate` samples as in the paper.

        model.generate(**inputs, **adaptive_generate_kwargs(tokenizer), max_new_tokens=200)

    Args:
        tokenizer (`PreTrainedTokenizerBase` or `VocabularyTable`): the model's tokenizer.
        preset (`str`): a pair of temperatures, see `PRESETS`.
        over: options of `AdaptiveTemperatureLogitsProcessor` (`block_temperature`, `scope`, `language`, ...) and of
            `generate` (`top_p`, `min_p`, `max_new_tokens`, ...). `temperature` belongs to the processor; the result always
            has `temperature=1.0`.

    Returns:
        `dict` with `logits_processor`, `do_sample`, `temperature`, `top_k`, `top_p`, `num_beams` and the rest of `over`.
    """
    options = {name: over.pop(name) for name in PROCESSOR_OPTIONS if name in over}
    if options.get("rule") is None:
        options["preset"] = preset
    others = over.pop("logits_processor", ())
    arguments = {**SAMPLING, **over}
    if not arguments["do_sample"]:
        _warn_greedy()
    processor = AdaptiveTemperatureLogitsProcessor(tokenizer, **options)
    return {"logits_processor": LogitsProcessorList([*others, processor]), **arguments}


class _Installed:
    """Replaces a method of one model. It holds the model, not a bound method, so that copies of the model work."""

    method: str

    def __init__(self, model, processor, settings: Mapping):
        self.model, self.processor, self.settings = model, processor, dict(settings)
        self.previous = model.__dict__.get(self.method)

    def original(self, *args, **kwargs):
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return getattr(type(self.model), self.method)(self.model, *args, **kwargs)


class _Generate(_Installed):
    method = "generate"

    def __init__(self, model, processor, settings: Mapping):
        super().__init__(model, processor, settings)
        self.warned = False

    def __call__(self, *args, **kwargs):
        args, kwargs = _by_name(self.model, args, kwargs)
        if not self._samples(kwargs.get("do_sample"), kwargs.get("generation_config")):
            if not self.warned:
                _warn_greedy()
                self.warned = True
            return self.original(*args, **kwargs)
        processors = LogitsProcessorList([*(kwargs.pop("logits_processor", None) or ()), self.processor])
        return self.original(*args, logits_processor=processors, **{**self.settings, **kwargs})

    def _samples(self, do_sample: bool | None, config) -> bool:
        """Whether `generate` samples: by the argument, else by the given config, else by the model's."""
        choices = (do_sample, config and config.do_sample, self.model.generation_config.do_sample)
        return next((bool(choice) for choice in choices if choice is not None), False)


def _by_name(model, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments of a call of `generate`, all but the first by name."""
    signature = _generate_signature(model)
    if len(args) < 2 or signature is None:
        return args, kwargs
    positional = signature.bind_partial(model, *args).arguments  # refuses too many, as the call itself would
    named = dict(list(positional.items())[2:])
    if repeated := sorted(named.keys() & kwargs.keys()):
        raise TypeError(f"generate() got multiple values for argument {repeated[0]!r}")
    return args[:1], {**named, **kwargs}


def _generate_signature(model) -> inspect.Signature | None:
    """Signature of the first `generate` that names its arguments; wrappers such as `PeftModel` pass `*args` on."""
    for kind in type(model).__mro__:
        if "generate" in vars(kind):
            signature = inspect.signature(vars(kind)["generate"])
            if all(parameter.kind is not parameter.VAR_POSITIONAL for parameter in signature.parameters.values()):
                return signature
    return _generate_signature(model.get_base_model()) if hasattr(model, "get_base_model") else None


class _ContinuousBatching(_Installed):
    """`generate_batch` takes no processors. It calls this method of the model to get them."""

    method = "_get_logits_processor"

    def __call__(self, generation_config, *args, **kwargs):
        if args or kwargs or not generation_config.do_sample:  # called by `generate`, or greedy
            return self.original(generation_config, *args, **kwargs)
        config = copy.deepcopy(generation_config)
        config.update(**self.settings)
        return self.original(config, logits_processor=LogitsProcessorList([self.processor]))


def _model_of(model_or_pipeline):
    model = model_or_pipeline if hasattr(model_or_pipeline, "generate") else getattr(model_or_pipeline, "model", None)
    if model is None or not hasattr(model, "generate") or not hasattr(model, "generation_config"):
        raise TypeError(
            f"expected a model with `generate` or a pipeline of one, got {type(model_or_pipeline).__name__}"
        )
    return model


def install_adaptive_temperature(model_or_pipeline, tokenizer=None, continuous_batching: bool = False, **options):
    """Make every sampling call of a model's `generate` use an adaptive temperature, until `uninstall_adaptive_temperature`.

    Arguments of a call override the installed settings. `temperature`, `top_k`, `top_p` and `num_beams` of generation
    configs, the checkpoint's included, do not. Greedy calls are unchanged, with one warning, and so are the files that
    the model saves.

    Args:
        model_or_pipeline: a model with `generate`, a `PeftModel`, or a transformers pipeline.
        tokenizer (`PreTrainedTokenizerBase`, `VocabularyTable` or `LogitsProcessor`, *optional*): the model's tokenizer,
            or the processor to install; by default the pipeline's tokenizer.
        continuous_batching (`bool`): install for `generate_batch` instead of `generate`, with
            `LastTokenTemperatureLogitsProcessor`.
        options: of `adaptive_generate_kwargs`.

    Returns:
        The installed processor.

    Raises:
        ValueError: an adaptive temperature is installed already, or an option is out of range.
        TypeError: not a model, or no tokenizer.
    """
    model = _model_of(model_or_pipeline)
    if _installed(model):
        raise ValueError(
            "an adaptive temperature is installed on this model already; call uninstall_adaptive_temperature first"
        )
    tokenizer = getattr(model_or_pipeline, "tokenizer", None) if tokenizer is None else tokenizer
    if tokenizer is None:
        raise TypeError("tokenizer must be given: the model does not know what its ids mean")
    if hasattr(tokenizer, "supports_continuous_batching"):
        processor, settings = tokenizer, {**SAMPLING, **options}
    elif continuous_batching:
        names = ("block_temperature", "temperature", "preset")
        processor = LastTokenTemperatureLogitsProcessor(tokenizer, **{n: options.pop(n) for n in names if n in options})
        settings = {**SAMPLING, **options}
    else:
        settings = adaptive_generate_kwargs(tokenizer, **options)
        processor = settings.pop("logits_processor")[-1]
    if continuous_batching != bool(processor.supports_continuous_batching):
        raise ValueError(f"continuous_batching={continuous_batching} does not fit {type(processor).__name__}")
    settings.pop("do_sample")
    stand_in = (_ContinuousBatching if continuous_batching else _Generate)(model, processor, settings)
    setattr(model, stand_in.method, stand_in)
    return processor


def _installed(model) -> list[_Installed]:
    return [value for value in model.__dict__.values() if isinstance(value, _Installed)]


def uninstall_adaptive_temperature(model_or_pipeline) -> None:
    """Undo `install_adaptive_temperature`, if it was called on this model."""
    model = _model_of(model_or_pipeline)
    for stand_in in _installed(model):
        if stand_in.previous is None:
            delattr(model, stand_in.method)
        else:
            setattr(model, stand_in.method, stand_in.previous)
