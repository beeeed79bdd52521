"""For tools that do not know this package: a GGUF file, as llama.cpp reads it, or a plain folder, as transformers alone
reads it. Both have the dense model's shapes and size. A GGUF file is read back, and its logits compared, before it is there.

hf-qst export --model smaller --file_type f16 --output_dir for_llama_cpp
hf-qst export --model smaller --format folder --output_dir plain
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from hf_qst import to_dense
from hf_qst.extras import require
from hf_qst.reshaped_models import ReshapedModelError
from hf_qst.saved.whole_files import whole_files
from hf_qst_plugins.gguf_files import GGUFError, require_writable, write_gguf
from hf_qst_plugins.inputs import load_model

from .arguments import Arguments
from .errors import UsageError
from .folders import require_free
from .job import Job
from .loading import config_of, plan_of_model, require_adapter, tokenizer_of
from .measures import size
from .methods import directory_sizes
from .options import AdapterOptions, ModelOptions, OutputOptions

FILE_NAME = "model.gguf"


@dataclass
class ExportOptions:
    """What is written.

    Args:
        format: gguf, or folder, which transformers reads without this package.
        file_type: how a GGUF file holds matrices.
        pre_tokenizer: llama.cpp's name of how text is split before a tokenizer's merges; by default it is found.
    """

    format: Literal["gguf", "folder"] = "gguf"
    file_type: Literal["f32", "f16", "bf16", "q8_0"] = "f32"
    pre_tokenizer: str | None = None


def add_arguments(arguments: Arguments) -> None:
    arguments.add(ModelOptions, skip={"quantization", "device"})
    arguments.add(AdapterOptions)
    arguments.add(ExportOptions)
    arguments.add(OutputOptions)
    arguments.flag("overwrite", "Replace what is in --output_dir.")


def prepare(options) -> Job:
    require_free(options.output_dir, options.overwrite)
    if options.adapter is not None:
        require_adapter(options.adapter)
    tokenizer = tokenizer_of(options)
    if options.format == "gguf":
        try:
            require("gguf", "a GGUF file")
            require_writable(config_of(options), tokenizer, options.pre_tokenizer)
        except ImportError as error:
            raise UsageError("format", error) from error
        except GGUFError as error:
            raise UsageError("model", error) from error

    def work(record) -> None:
        model = load_model(options.model, device="cpu", adapter=options.adapter)
        if options.adapter is not None:
            model = model.merge_and_unload()
        record.content["before"] = {**size(model), "perplexity": {}, "completions": []}
        os.makedirs(options.output_dir, exist_ok=True)
        write = _write_file if options.format == "gguf" else _write_folder
        try:
            record.content["export"] = write(model, tokenizer, options)
        except (GGUFError, ReshapedModelError) as error:
            raise UsageError("model", error) from error
        record.content["files"] = directory_sizes(options.output_dir)

    def plan():
        return [plan_of_model(options), f"writes: {options.output_dir}, in the dense model's shapes"]

    return Job(plan, work, options.output_dir)


def _write_file(model, tokenizer, options) -> dict:
    path = Path(options.output_dir) / FILE_NAME
    written = write_gguf(model, tokenizer, path, options.file_type, options.pre_tokenizer)
    print(
        f"{path}: {written.bytes:,} bytes, {written.parameters:,} parameters, of which the model has "
        f"{written.kept_parameters:,}"
    )
    print(f"read back: logits differ by {written.difference:.2e} of the largest")
    if written.unread:
        print(f"transformers does not read {', '.join(written.unread)} from such a file; llama.cpp does")
    return asdict(written)


def _write_folder(model, tokenizer, options) -> dict:
    dense = to_dense(model)
    with whole_files(options.output_dir) as staging:
        dense.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
    counts = {"parameters": dense.num_parameters(), "kept_parameters": model.num_parameters()}
    print(
        f"{options.output_dir}: {counts['parameters']:,} parameters, of which the model has {counts['kept_parameters']:,}"
    )
    return {"class": type(dense).__name__, **counts}
