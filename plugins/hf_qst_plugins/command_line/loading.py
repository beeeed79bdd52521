"""Models, tokenizers and rows of tokens by the options that name them; what is wrong is the option's error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import hf_qst  # noqa: F401  (registers the methods with PEFT and the reshaped models with transformers)
from hf_qst_plugins.inputs import (
    BlockDataset,
    Collator,
    DataError,
    NoModelError,
    load_model,
    model_path,
    read_rows,
    token_rows,
)

from .errors import UsageError, one_line


def tokenizer_of(options):
    """The tokenizer of `--model`.

    Raises:
        UsageError: the model or its tokenizer is not there.
    """
    _require_there(options.model)
    try:
        return AutoTokenizer.from_pretrained(model_path(options.model))
    except (NoModelError, OSError, ValueError) as error:
        raise UsageError("model", _short(error)) from error


def _require_there(model: str) -> None:
    if model.startswith((".", "/", "~")) and not Path(model).exists():
        raise UsageError("model", f"there is no file or folder {model!r}")


def config_of(options):
    """The configuration of `--model`, without its weights.

    Raises:
        UsageError: it is not there, or of a type that transformers does not know.
    """
    _require_there(options.model)
    try:
        return AutoConfig.from_pretrained(model_path(options.model))
    except (NoModelError, OSError, ValueError) as error:
        raise UsageError("model", _short(error)) from error


def model_of(options, adapter: str | None = None, device: str | None = None):
    """The model of `--model` and `--quantization`, with an adapter if one is named.

    Raises:
        UsageError: it cannot be loaded; the message names the option that is to blame.
    """
    if adapter is not None:
        require_adapter(adapter)
    try:
        return load_model(options.model, options.quantization, device or options.device, adapter)
    except ImportError as error:
        if options.quantization is None:
            raise
        raise UsageError(
            "quantization",
            f"{options.quantization!r} needs bitsandbytes: pip install 'hf_qst[quantized]', or --quantization null",
        ) from error
    except (NoModelError, OSError) as error:
        raise UsageError("model", _short(error)) from error


def require_adapter(adapter: str) -> None:
    """Check that `--adapter` names an adapter.

    Raises:
        UsageError: its configuration cannot be read.
    """
    from peft import PeftConfig

    try:
        PeftConfig.from_pretrained(adapter)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError("adapter", _short(error)) from error


def plan_of_model(options) -> str:
    """One line about `--model`, from its configuration alone."""
    config = config_of(options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    count = sum(p.numel() for p in model.parameters())
    quantization = getattr(options, "quantization", None)
    how = f" in {quantization}" if quantization else ""
    return f"model: {options.model}{how}, {type(model).__name__}, {count:,} parameters"


@dataclass
class Texts:
    """Rows of tokens.

    Args:
        training: rows to learn from or to calibrate on.
        held_out: rows to measure on, by the name of their kind: `in_domain`, and `other` where there is other data.
    """

    training: Sequence
    held_out: dict[str, Sequence]

    def plan(self) -> list[str]:
        """Lines that say how much there is."""
        lines = [f"data: {_count(self.training)}"]
        return lines + [f"measured on: {_count(rows)} ({name})" for name, rows in self.held_out.items()]


def texts_of(options, tokenizer) -> Texts:
    """The rows of `--data`, `--evaluation_data` and `--other_data`.

    Without evaluation data the last rows of the data, at most a twentieth, are set aside for it.

    Raises:
        UsageError: naming the option whose data cannot be used.
    """
    training = rows_of("data", options, tokenizer)
    if options.evaluation_data is not None:
        held = evenly(rows_of("evaluation_data", options, tokenizer), options.evaluation_rows)
    else:
        count = min(options.evaluation_rows, max(1, len(training) // 20))
        if len(training) <= count:
            raise UsageError(
                "data", f"{len(training)} rows of {options.max_length} tokens are too few to set some aside"
            )
        training, held = _part(training, slice(None, -count)), _part(training, slice(-count, None))
    held_out = {"in_domain": held}
    if options.other_data is not None:
        held_out["other"] = evenly(rows_of("other_data", options, tokenizer), options.evaluation_rows)
    return Texts(training, held_out)


def rows_of(option: str, options, tokenizer) -> Sequence:
    """The rows of the data that an option names.

    Raises:
        UsageError: there are none, or they cannot be used.
    """
    try:
        examples = read_rows(getattr(options, option), options.data_split, options.data_subset, options.text_field)
        rows = token_rows(examples, tokenizer, options.max_length)
    except (DataError, ValueError) as error:
        raise UsageError(option, error) from error
    if not len(rows):
        raise UsageError(option, f"the text is shorter than one row of --max_length {options.max_length} tokens")
    return rows


def evenly(rows: Sequence, count: int) -> Sequence:
    """At most `count` of the rows, evenly spaced."""
    if count >= len(rows):
        return rows
    return _part(rows, torch.linspace(0, len(rows) - 1, count).round().long().tolist())


def batches(rows: Sequence, count: int, batch_size: int, pad_token_id: int) -> list[dict]:
    """Model inputs without labels of at most `count` rows, evenly spaced."""
    collate, chosen = Collator(pad_token_id), evenly(rows, count)
    parts = [
        collate([chosen[i] for i in range(s, min(s + batch_size, len(chosen)))])
        for s in range(0, len(chosen), batch_size)
    ]
    return [{name: tensor for name, tensor in part.items() if name != "labels"} for part in parts]


def _part(rows: Sequence, where) -> Sequence:
    if isinstance(rows, BlockDataset):
        return BlockDataset(rows.rows[where])
    return rows[where] if isinstance(where, slice) else [rows[i] for i in where]


def _count(rows: Sequence) -> str:
    return f"{len(rows):,} rows, {sum(len(row['input_ids']) for row in rows):,} tokens"


def _short(error: Exception) -> str:
    """The first sentence of an error of transformers, which goes on with advice for several lines."""
    return one_line(str(error).strip().split("\n")[0])
