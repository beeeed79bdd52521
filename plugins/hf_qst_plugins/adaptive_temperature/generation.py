"""Putting the processor into `generate`: its keyword arguments, or an installation on a model or pipeline."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Mapping

from transformers import LogitsProcessorList

from hf_qst_plugins.adaptive_temperature.processor import (
    AdaptiveTemperatureLogitsProcessor,
    LastTokenTemperatureLogitsProcessor,
)

logger = logging.getLogger(__name__)

SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 0.95, "num_beams": 1}
"""The paper's settings beside the two temperatures. transformers multiplies `temperature` with the processor's and, when
it is left out, takes a checkpoint's own `temperature` and `top_k=50`, so all of them are always given."""

PROCESSOR_OPTIONS = (
    "block_temperature",
    "scope",
    "language",
    "region",
    "rule",
    "max_batch_size",
)


def _warn_greedy() -> None:
    logger.warning(
        "do_sample=False: the adaptive temperature does nothing, greedy decoding takes the largest score whatever the "
        "temperature; pass do_sample=True"
    )


def adaptive_generate_kwargs(tokenizer, preset: str = "default", **over) -> dict:
    """The keyword arguments that make `model.generate` sample as the paper does.

        model.generate(**inputs, **adaptive_generate_kwargs(tokenizer), max_new_tokens=200)

    Args:
        tokenizer (`PreTrainedTokenizerBase` or `VocabularyTable`): what the ids mean.
        preset (`str`): a pair of temperatures, see `PRESETS`.
        over: options of `AdaptiveTemperatureLogitsProcessor` (`block_temperature`, `scope`, `language`, ...) and of
            `generate` (`top_p`, `min_p`, `max_new_tokens`, ...). `temperature` is the processor's: the argument of that
            name in the result is always 1.0.

    Returns:
        `dict` with `logits_processor`, `do_sample`, `temperature`, `top_k`, `top_p`, `num_beams` and what else was given.
    """
    options = {name: over.pop(name) for name in (*PROCESSOR_OPTIONS, "temperature") if name in over}
    if options.get("rule") is None:
        options["preset"] = preset
    given = over.pop("logits_processor", ())
    arguments = {**SAMPLING, **over}
    if not arguments["do_sample"]:
        _warn_greedy()
    processor = AdaptiveTemperatureLogitsProcessor(tokenizer, **options)
    return {"logits_processor": LogitsProcessorList([*given, processor]), **arguments}


class _Installed:
    """Stands in for a method of one model. Holds the model and not a bound method, so that copies of the model work."""

    method: str

    def __init__(self, model, processor):
        self.model = model
        self.processor = processor
        self.previous = model.__dict__.get(self.method)

    def original(self, *args, **kwargs):
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return getattr(type(self.model), self.method)(self.model, *args, **kwargs)


class _Generate(_Installed):
    method = "generate"

    def __init__(self, model, processor, settings: Mapping):
        super().__init__(model, processor)
        self.settings = dict(settings)
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
        """What `generate` will do: the argument, else the given config, else the model's own."""
        choices = (do_sample, config and config.do_sample, self.model.generation_config.do_sample)
        return next((bool(choice) for choice in choices if choice is not None), False)


def _by_name(model, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A call of `generate` with all arguments but the first by name, so that it is read in one way."""
    signature = _generate_signature(model)
    if len(args) < 2 or signature is None:
        return args, kwargs
    given = signature.bind_partial(model, *args).arguments  # refuses too many, as the call itself would
    named = dict(list(given.items())[2:])
    if twice := sorted(named.keys() & kwargs.keys()):
        raise TypeError(f"generate() got multiple values for argument {twice[0]!r}")
    return args[:1], {**named, **kwargs}


def _generate_signature(model) -> inspect.Signature | None:
    """That of the `generate` which names its arguments: wrappers such as `PeftModel` hand on `*args`."""
    for kind in type(model).__mro__:
        if "generate" in vars(kind):
            signature = inspect.signature(vars(kind)["generate"])
            if all(parameter.kind is not parameter.VAR_POSITIONAL for parameter in signature.parameters.values()):
                return signature
    return _generate_signature(model.get_base_model()) if hasattr(model, "get_base_model") else None


class _ContinuousBatching(_Installed):
    """`generate_batch` takes no processors: it asks the model for them by this method, with a generation config."""

    method = "_get_logits_processor"

    def __init__(self, model, processor, settings: Mapping):
        super().__init__(model, processor)
        self.settings = dict(settings)

    def __call__(self, generation_config, *args, **kwargs):
        if args or kwargs or not generation_config.do_sample:  # called by `generate`, or greedy
            return self.original(generation_config, *args, **kwargs)
        config = copy.deepcopy(generation_config)
        config.update(**self.settings)
        return self.original(config, logits_processor=LogitsProcessorList([self.processor]))


def _model_of(model_or_pipeline):
    model = (
        getattr(model_or_pipeline, "model", None) if not hasattr(model_or_pipeline, "generate") else model_or_pipeline
    )
    if model is None or not hasattr(model, "generate") or not hasattr(model, "generation_config"):
        raise TypeError(
            f"expected a model with `generate` or a pipeline of one, got {type(model_or_pipeline).__name__}"
        )
    return model


def install_adaptive_temperature(model_or_pipeline, tokenizer=None, continuous_batching: bool = False, **options):
    """Make every sampling call of a model's `generate` use an adaptive temperature, until `uninstall_adaptive_temperature`.

    Arguments of a call go before what is installed; `temperature`, `top_k`, `top_p` and `num_beams` of generation
    configs, the checkpoint's among them, do not. Greedy calls are left alone, with one warning. Files that the model
    saves, its generation config among them, are as before.

    Args:
        model_or_pipeline: a model with `generate` (a `PeftModel` too), or a transformers pipeline.
        tokenizer (`PreTrainedTokenizerBase`, `VocabularyTable` or `LogitsProcessor`, *optional*): what the ids mean, or
            a processor that is ready; a pipeline's own by default.
        continuous_batching (`bool`): install for `generate_batch` in place of `generate`, with the rule that needs the
            last token alone (`LastTokenTemperatureLogitsProcessor`).
        options: of `adaptive_generate_kwargs`.

    Returns:
        The processor that was installed.

    Raises:
        ValueError: one is installed already, or an option is out of range.
        TypeError: no model, or no tokenizer.
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
    """Undo `install_adaptive_temperature`; does nothing where nothing is installed."""
    model = _model_of(model_or_pipeline)
    for stand_in in _installed(model):
        if stand_in.previous is None:
            delattr(model, stand_in.method)
        else:
            setattr(model, stand_in.method, stand_in.previous)
