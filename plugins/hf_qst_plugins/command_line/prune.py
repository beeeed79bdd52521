"""`--method disp` learns the widths in a training. The other methods score the channels of the data's activations or of
the weights and need none. Saves the smaller model, which the Auto classes load after `import hf_qst`.

hf-qst prune --model smollm2 --data notes.jsonl --keep_ratio 0.8 --output_dir smaller --max_steps 300
hf-qst prune --model smollm2 --data notes.jsonl --keep_ratio 0.8 --output_dir smaller --method flap
"""

from __future__ import annotations

from dataclasses import fields
from inspect import signature

from peft import get_peft_model
from transformers import TrainingArguments, set_seed

from hf_qst import DISPConfig, prune_model
from hf_qst.pruning import PRUNING_METHODS
from hf_qst_plugins.pruning import DISPCallback

from .arguments import Arguments
from .errors import UsageError
from .folders import require_free
from .job import Job
from .loading import batches, plan_of_model, texts_of, tokenizer_of
from .measures import pad_token_id
from .methods import add_method, make_smaller
from .options import CalibrationOptions, DataOptions, ModelOptions, SampleOptions
from .training import add_training, expected, train, training_arguments

_OF_SCORES = set(signature(prune_model).parameters)
_OF_DISP = {f.name for f in fields(DISPConfig)}
_OF_TRAINING = {f.name for f in fields(TrainingArguments)} | {"resume"}


def add_arguments(arguments: Arguments) -> None:
    arguments.add(ModelOptions)
    arguments.add(DataOptions)
    # The two ways to prune share most options; the seed is Trainer's.
    add_method(arguments, DISPConfig, skip={"seed"})
    arguments.add(prune_model, skip=_OF_SCORES - {"method", "allocation"})
    arguments.add(CalibrationOptions)
    arguments.add(SampleOptions)
    # As in the method's paper, at twice its rate, which is for ten thousand steps.
    add_training(
        arguments, method="disp", lr_scheduler_type="constant", weight_decay=0.05, max_grad_norm=0.0, save_strategy="no"
    )


def prepare(options) -> Job:
    if options.method == "disp":
        return _by_training(options)
    if options.method not in PRUNING_METHODS:
        raise UsageError("method", f"it must be one of disp, {', '.join(PRUNING_METHODS)}, got {options.method!r}")
    return _by_scores(options)


def _by_training(options) -> Job:
    _refuse(options, {"allocation"}, "it is of the methods that score; leave it out with --method disp")
    settings, checkpoint = training_arguments(options)
    method = {"task_type": "CAUSAL_LM", "seed": options.seed}
    config = options.build(DISPConfig, **method)
    tokenizer = tokenizer_of(options)
    texts = texts_of(options, tokenizer)

    def shrink(model, record):
        callback = DISPCallback(progress=False)
        set_seed(options.seed)  # also where the adapter starts; Trainer sets it afterwards
        model = get_peft_model(model, options.build(DISPConfig, **method))
        held_out = texts.held_out["in_domain"]
        record.content["training"] = train(model, settings, texts.training, held_out, tokenizer, checkpoint, [callback])
        record.content["choice"] = str(callback.report)
        return model.merge_and_unload()

    def plan():
        return [
            plan_of_model(options),
            *texts.plan(),
            f"learns: widths that keep {options.keep_ratio:.0%}, {options.output_dir} gets the smaller model",
            *expected(options, config, settings),
        ]

    work = make_smaller(options, tokenizer, texts.held_out, shrink, str(settings.device))
    return Job(plan, work, options.output_dir, checkpoints=True)


def _by_scores(options) -> Job:
    training = set(options.given) & (_OF_TRAINING | _OF_DISP) - _OF_SCORES - {"output_dir"}
    _refuse(options, training, f"it is for --method disp; leave it out with --method {options.method}")
    require_free(options.output_dir, options.overwrite)
    tokenizer = tokenizer_of(options)
    texts = texts_of(options, tokenizer)

    def shrink(model, record):
        chosen = {name: getattr(options, name) for name in _OF_SCORES - {"model", "calibration_data"}}
        sizes = options.calibration_rows, options.calibration_batch_size
        data = batches(texts.training, *sizes, pad_token_id(tokenizer))
        needs_data = PRUNING_METHODS[options.method].needs_data
        return prune_model(model, calibration_data=data if needs_data else None, **chosen)

    def plan():
        return [
            plan_of_model(options),
            *texts.plan(),
            f"prunes by {options.method} to {options.keep_ratio:.0%}, {options.output_dir} gets the smaller model",
        ]

    return Job(plan, make_smaller(options, tokenizer, texts.held_out, shrink), options.output_dir)


def _refuse(options, names: set[str], why: str) -> None:
    wrong = sorted(names & options.given)
    if wrong:
        raise UsageError(wrong[0], why)
