"""Nothing is trained: ranks and factors come from one look at the data. Saves the smaller model, which the Auto classes
load after `import hf_qst`.

hf-qst compress --model smollm2 --data notes.jsonl --keep_ratio 0.8 --output_dir factors --quantize_factors nf4
hf-qst compress --model folder --data notes.jsonl --keep_ratio 0.8 --output_dir factors --from_disk
"""

from __future__ import annotations

import os
from dataclasses import asdict

from peft import get_peft_model

from hf_qst import MixedRankConfig
from hf_qst.mixed_rank import compress_folder
from hf_qst_plugins.inputs import device_and_dtype, model_path

from .arguments import Arguments
from .errors import UsageError
from .folders import require_free
from .job import Job
from .loading import batches, plan_of_model, texts_of, tokenizer_of
from .measures import pad_token_id
from .methods import add_method, directory_sizes, make_smaller
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
    arguments.flag(
        "from_disk",
        "Read the model's folder block by block, for a model that does not fit into memory. Nothing is measured before or "
        "after.",
    )


def prepare(options) -> Job:
    options.build(MixedRankConfig)
    require_free(options.output_dir, options.overwrite)
    if options.from_disk:
        _require_readable(options)
    tokenizer = tokenizer_of(options)
    texts = texts_of(options, tokenizer)

    def config():
        sizes = options.calibration_rows, options.calibration_batch_size
        data = batches(texts.training, *sizes, pad_token_id(tokenizer))
        return options.build(MixedRankConfig, calibration_data=data)

    def from_disk(record) -> None:
        device, dtype = device_and_dtype(options.device)
        report = compress_folder(model_path(options.model), options.output_dir, config(), dtype=dtype, device=device)
        record.content["compression"] = asdict(report)
        record.content["files"] = directory_sizes(options.output_dir)

    def plan():
        return [
            plan_of_model(options),
            *texts.plan(),
            f"replaces weights by factors that keep {options.keep_ratio:.0%}, {options.output_dir} gets the smaller model",
        ]

    shrink = lambda model, record: get_peft_model(model, config()).merge_and_unload()
    in_memory = make_smaller(options, tokenizer, texts.held_out, shrink)
    return Job(plan, from_disk if options.from_disk else in_memory, options.output_dir)


def _require_readable(options) -> None:
    for name in ("quantization", "prompts"):
        if getattr(options, name):
            raise UsageError(name, "leave it out with --from_disk: it is for a model in memory")
    if not os.path.isdir(model_path(options.model)):
        raise UsageError("from_disk", f"--model must be a folder, got {options.model!r}")
