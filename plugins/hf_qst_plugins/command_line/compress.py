"""Nothing is trained: ranks and factors come from one look at the data. Saves the smaller model, which the Auto classes
load after `import hf_qst`.

hf-qst compress --model smollm2 --data notes.jsonl --keep_ratio 0.8 --output_dir factors --quantize_factors nf4
"""

from __future__ import annotations

from peft import get_peft_model

from hf_qst import MixedRankConfig

from .arguments import Arguments
from .folders import require_free
from .job import Job
from .loading import batches, plan_of_model, texts_of, tokenizer_of
from .measures import pad_token_id
from .methods import add_method, make_smaller
from .options import CalibrationOptions, DataOptions, ModelOptions, OutputOptions, SampleOptions


def add_arguments(arguments: Arguments) -> None:
    arguments.add(ModelOptions)
    arguments.add(DataOptions)
    # Of an adapter that stays beside the model; here there is none.
    add_method(arguments, MixedRankConfig, skip={"residual", "keep_base_weights", "modules_to_save"})
    arguments.add(CalibrationOptions)
    arguments.add(SampleOptions)
    arguments.add(OutputOptions)
    arguments.flag("overwrite", "Replace what is in --output_dir.")


def prepare(options) -> Job:
    options.build(MixedRankConfig)
    require_free(options.output_dir, options.overwrite)
    tokenizer = tokenizer_of(options)
    texts = texts_of(options, tokenizer)

    def shrink(model, record):
        sizes = options.calibration_rows, options.calibration_batch_size
        data = batches(texts.training, *sizes, pad_token_id(tokenizer))
        return get_peft_model(model, options.build(MixedRankConfig, calibration_data=data)).merge_and_unload()

    def plan():
        return [
            plan_of_model(options),
            *texts.plan(),
            f"replaces weights by factors that keep {options.keep_ratio:.0%}, {options.output_dir} gets the smaller model",
        ]

    return Job(plan, make_smaller(options, tokenizer, texts.held_out, shrink), options.output_dir)
