"""Saves the adapter, which `PeftModel.from_pretrained` loads onto the same model after `import hf_qst`.

hf-qst finetune --model smollm2 --data notes.jsonl --output_dir tuned --max_steps 200
"""

from __future__ import annotations

from peft import get_peft_model
from transformers import set_seed

from hf_qst import QSTConfig

from .arguments import Arguments
from .job import Job
from .loading import batches, model_of, plan_of_model, texts_of, tokenizer_of
from .measures import measure, pad_token_id
from .methods import add_method, directory_sizes
from .options import CalibrationOptions, DataOptions, ModelOptions, SampleOptions
from .training import add_training, expected, train, training_arguments


def add_arguments(arguments: Arguments) -> None:
    arguments.add(ModelOptions, skip={"device"})
    arguments.add(DataOptions)
    add_method(arguments, QSTConfig)
    arguments.add(CalibrationOptions)
    arguments.add(SampleOptions)
    add_training(arguments, quantization="nf4")


def prepare(options) -> Job:
    settings, checkpoint = training_arguments(options)
    method = options.build(QSTConfig, task_type="CAUSAL_LM", calibration_data=None)
    tokenizer = tokenizer_of(options)
    texts = texts_of(options, tokenizer)

    def work(record) -> None:
        model = model_of(options, device=str(settings.device))
        record.content["before"] = measure(model, tokenizer, texts.held_out, options)
        data = None
        if options.downsample == "principal":
            sizes = options.calibration_rows, options.calibration_batch_size
            data = batches(texts.training, *sizes, pad_token_id(tokenizer))
        set_seed(options.seed)  # also where the adapter starts; Trainer sets it afterwards
        model = get_peft_model(model, options.build(QSTConfig, task_type="CAUSAL_LM", calibration_data=data))
        held_out = texts.held_out["in_domain"]
        record.content["training"] = train(model, settings, texts.training, held_out, tokenizer, checkpoint)
        record.content["after"] = measure(model, tokenizer, texts.held_out, options)
        model.save_pretrained(options.output_dir)
        record.content["files"] = directory_sizes(options.output_dir)

    def plan():
        return [
            plan_of_model(options),
            *texts.plan(),
            f"learns: a side network, {options.output_dir} gets the adapter",
            *expected(options, method, settings),
        ]

    return Job(plan, work, options.output_dir, checkpoints=True)
