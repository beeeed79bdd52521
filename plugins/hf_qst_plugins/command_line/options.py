"""Options that several commands share. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ModelOptions:
    """Which model.

    Args:
        model: a hub name, a folder (of a pruned or factorised model too), a GGUF file, or 'smollm2'.
        quantization: load the weights in 'nf4' or 'int8'; null leaves them as they are.
        device: cpu, cuda, cuda:1, ...; by default the first GPU, else the CPU.
    """

    model: str
    quantization: str | None = None
    device: str | None = None


@dataclass
class AdapterOptions:
    """An adapter on the model.

    Args:
        adapter: folder or hub name of a PEFT adapter, of this package's methods or others.
    """

    adapter: str | None = None


@dataclass
class DataOptions:
    """Which texts.

    Args:
        data: JSON lines, a text file, a folder of texts, or a name for `datasets.load_dataset`. Examples have 'text',
            'messages', or 'prompt' and 'completion'.
        evaluation_data: text of the same kind to measure on; by default the end of the data, which is then not used for
            anything else.
        other_data: text of another kind, for what the model should not forget.
        data_split: part of a data set.
        data_subset: configuration of a data set.
        text_field: the field that holds the text of an example.
        max_length: tokens of a row.
        evaluation_rows: the most rows to measure on, for each kind of text.
        evaluation_batch_size: rows at a time when measuring.
    """

    data: str
    evaluation_data: str | None = None
    other_data: str | None = None
    data_split: str = "train"
    data_subset: str | None = None
    text_field: str = "text"
    max_length: int = 512
    evaluation_rows: int = 64
    evaluation_batch_size: int = 4


@dataclass
class CalibrationOptions:
    """How much of the data a method looks at.

    Args:
        calibration_rows: the most rows, evenly spaced over the data.
        calibration_batch_size: rows at a time.
    """

    calibration_rows: int = 128
    calibration_batch_size: int = 4


@dataclass
class SampleOptions:
    """Completions that are recorded before and after.

    Args:
        prompts: a text to complete greedily, or a list of them.
        max_new_tokens: the most tokens of a completion.
    """

    prompts: str | list[str] = field(default_factory=list)
    max_new_tokens: int = 48


@dataclass
class OutputOptions:
    """Where the results go.

    Args:
        output_dir: folder of the result, its JSON record and its report.
    """

    output_dir: str | None = None
