"""What the commands of the three methods share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from peft import PeftConfig

from hf_qst_plugins.inputs import load_model

from .arguments import Arguments
from .loading import model_of
from .measures import measure
from .record import Record

# Fields that PEFT fills in, and data.
_NOT_OPTIONS = {f.name for f in fields(PeftConfig)} | {"manifest", "calibration_data", "init_weights"}


def add_method(arguments: Arguments, config: type, skip=()) -> None:
    """Options for the fields of a method's configuration."""
    arguments.add(config, skip={*_NOT_OPTIONS, *skip})


def make_smaller(options, tokenizer, held_out: dict, shrink: Callable, device: str | None = None) -> Callable:
    """The work of a command that writes a smaller model: what is measured after is the model read back from its folder.

    Args:
        options: of the command.
        tokenizer: saved with the model.
        held_out: rows by name to measure on.
        shrink: makes the smaller model of (model, record).
        device: by default that of `--device`.
    """

    def work(record: Record) -> None:
        model = model_of(options, device=device)
        record.content["before"] = measure(model, tokenizer, held_out, options)
        started = time.perf_counter()
        small = shrink(model, record)
        record.content["method_seconds"] = round(time.perf_counter() - started, 2)
        small.save_pretrained(options.output_dir)
        tokenizer.save_pretrained(options.output_dir)
        del model, small
        again = load_model(options.output_dir, device=device or options.device)
        record.content["after"] = measure(again, tokenizer, held_out, options)
        record.content["files"] = directory_sizes(options.output_dir)

    return work


def directory_sizes(folder: str) -> dict[str, int]:
    """Bytes of the files in a folder, without those in its subfolders."""
    return {path.name: path.stat().st_size for path in sorted(Path(folder).iterdir()) if path.is_file()}
