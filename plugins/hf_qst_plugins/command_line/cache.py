"""Runs the base once over the data and stores its hidden states, which `hf-qst finetune --hidden_state_cache FOLDER` reads
in place of running it. Give both commands the same model, data, --max_length, and options of the side network.

hf-qst cache --model smollm2 --data notes.jsonl --folder states
hf-qst finetune --model smollm2 --data notes.jsonl --hidden_state_cache states --output_dir tuned --num_train_epochs 5
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from peft import get_peft_model

from hf_qst import QSTConfig
from hf_qst.qst import HiddenStateCacheConfig, HiddenStateCacheError, fill_hidden_state_cache

from .arguments import Arguments
from .errors import UsageError
from .folders import require_free
from .job import Job
from .loading import batches, model_of, plan_of_model, texts_of, tokenizer_of
from .measures import pad_token_id
from .methods import add_method
from .options import DataOptions, ModelOptions, OutputOptions


@dataclass
class FillOptions:
    """How it is filled.

    Args:
        batch_size: rows at a time.
    """

    batch_size: int = 4


def add_arguments(arguments: Arguments) -> None:
    arguments.add(ModelOptions)
    arguments.add(DataOptions)
    arguments.add(HiddenStateCacheConfig)
    arguments.add(FillOptions)
    add_method(arguments, QSTConfig, skip={"hidden_state_cache"})
    arguments.add(OutputOptions)
    arguments.parser.set_defaults(quantization="nf4")
    arguments.flag("overwrite", "Replace what is in --output_dir; stored states stay.")


def prepare(options) -> Job:
    require_free(options.output_dir, options.overwrite, required=False)
    if options.batch_size < 1:
        raise UsageError("batch_size", f"it must be at least 1, got {options.batch_size}")
    cache = options.build(HiddenStateCacheConfig, "folder")
    # What is stored does not depend on the directions of a fixed projection.
    config = options.build(QSTConfig, task_type="CAUSAL_LM", hidden_state_cache=cache)
    tokenizer = tokenizer_of(options)
    texts = texts_of(options, tokenizer)

    def work(record) -> None:
        model = get_peft_model(model_of(options), config)
        rows = batches(texts.training, len(texts.training), options.batch_size, pad_token_id(tokenizer))
        try:
            record.content["cache"] = asdict(fill_hidden_state_cache(model, rows))
        except HiddenStateCacheError as error:
            raise UsageError("folder", error) from error

    def plan():
        return [plan_of_model(options), *texts.plan(), f"stores the base's states in {options.folder}"]

    return Job(plan, work, options.output_dir)
