"""hf-qst models
hf-qst models --model meta-llama/Llama-3.2-1B
hf-qst models --model_type qwen3
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_qst import supported_models

from .arguments import Arguments
from .errors import UsageError
from .job import Job
from .loading import config_of


@dataclass
class TypeOptions:
    """Which type; all without an option.

    Args:
        model: a hub name, a folder, a GGUF file, or 'smollm2'; its configuration is read.
        model_type: a type by its name.
    """

    model: str | None = None
    model_type: str | None = None


def add_arguments(arguments: Arguments) -> None:
    arguments.add(TypeOptions)


def prepare(options) -> Job:
    table, wanted = supported_models(), options.model_type
    if options.model is not None:
        if wanted is not None:
            raise UsageError("model_type", "give it or --model")
        wanted = config_of(options).model_type
    if wanted is not None and wanted not in table:
        raise UsageError(
            "model" if options.model else "model_type",
            f"the type {wanted!r} is not known; hf_qst.register_architecture({wanted!r}, ...) may help",
        )
    rows = table if wanted is None else {wanted: table[wanted]}
    width = max(map(len, rows))

    def work(record) -> None:
        for name, methods in rows.items():
            print(f"{name:<{width}}  " + "; ".join(f"{method}: {verdict}" for method, verdict in methods.items()))

    return Job(lambda: [f"lists {len(rows)} types"], work)
