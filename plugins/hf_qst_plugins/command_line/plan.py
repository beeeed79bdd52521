"""Reads the model's configuration alone: no weights are loaded.

hf-qst plan --model meta-llama/Llama-3.1-8B --quantization nf4 --method qst --batch 2 --sequence 1024 --device 24GB
hf-qst plan --model smollm2 --method disp --keep_ratio 0.5
hf-qst plan --model smollm2 --method mixed_rank --batch 64 --sequence 512
hf-qst plan --model smollm2 --method none --inference
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from hf_qst import DISPConfig, MixedRankConfig, QSTConfig, plan
from hf_qst.planning import PlanError
from hf_qst_plugins.inputs import model_path, quantization_config

from .arguments import Arguments
from .errors import UsageError
from .folders import require_free
from .job import Job
from .loading import config_of
from .methods import add_method
from .options import ModelOptions, OutputOptions

_CONFIGS = {"qst": QSTConfig, "disp": DISPConfig, "mixed_rank": MixedRankConfig}
# Of an adapter that stays beside the model, and what is not planned.
_NOT_OPTIONS = {"residual", "keep_base_weights", "modules_to_save", "progress"}


@dataclass
class PlannedMethod:
    """What is planned.

    Args:
        method: qst, disp, mixed_rank, full (all parameters are trained) or none (the model alone, for --inference).
    """

    method: str = "qst"


def add_arguments(arguments: Arguments) -> None:
    arguments.add(ModelOptions, skip={"device"})
    arguments.add(PlannedMethod)
    arguments.add(plan, skip={"model_or_config", "method", "quantization_config", "dtype"})
    added: set[str] = set()
    for config in _CONFIGS.values():
        add_method(arguments, config, skip=added | _NOT_OPTIONS)
        added |= {f.name for f in fields(config)}
    arguments.add(OutputOptions)
    arguments.flag("overwrite", "Replace what is in --output_dir.")


def prepare(options) -> Job:
    require_free(options.output_dir, options.overwrite, required=False)
    if options.method in _CONFIGS:
        method = _method(options)
    elif options.method in ("full", "none"):
        method = "full" if options.method == "full" else None
    else:
        raise UsageError("method", f"it must be one of {', '.join(_CONFIGS)}, full, none, got {options.method!r}")
    if method is None and not options.inference:
        raise UsageError("method", "none is for --inference")
    config_of(options)
    quantization = quantization_config(options.quantization, torch.bfloat16)

    def work(record) -> None:
        try:
            made = plan(model_path(options.model), method, quantization_config=quantization, **options.values(plan))
        except PlanError as error:
            raise UsageError("model", error) from error
        print(made)
        record.content["plan"] = made.as_dict()

    return Job(lambda: [f"plans: {options.method} on {options.model}"], work, options.output_dir)


def _method(options):
    """The configuration of `--method`; a field that an earlier one has too is taken where it is given."""
    config = _CONFIGS[options.method]
    shared = {f.name for f in fields(config)} & options.given - _NOT_OPTIONS
    return options.build(config, task_type="CAUSAL_LM", **{name: getattr(options, name) for name in shared})
