"""Reads the model's configuration alone: no weights are loaded.

hf-qst plan --model meta-llama/Llama-3.1-8B --quantization nf4 --method qst --batch 2 --sequence 1024 --device 24GB
hf-qst plan --model smollm2 --method disp --keep_ratio 0.5
hf-qst plan --model smollm2 --method none --inference
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_qst import DISPConfig, QSTConfig, plan
from hf_qst.planning import PlanError
from hf_qst_plugins.inputs import model_path, quantization_config

from .arguments import Arguments
from .errors import UsageError
from .folders import require_free
from .job import Job
from .loading import config_of
from .methods import add_method
from .options import ModelOptions, OutputOptions

_CONFIGS = {"qst": QSTConfig, "disp": DISPConfig}


@dataclass
class PlannedMethod:
    """What is planned.

    Args:
        method: qst, disp, full (all parameters are trained) or none (the model alone, for --inference).
    """

    method: str = "qst"


def add_arguments(arguments: Arguments) -> None:
    arguments.add(ModelOptions, skip={"device"})
    arguments.add(PlannedMethod)
    arguments.add(plan, skip={"model_or_config", "method", "quantization_config", "dtype"})
    for config in _CONFIGS.values():
        add_method(arguments, config)
    arguments.add(OutputOptions)
    arguments.flag("overwrite", "Replace what is in --output_dir.")


def prepare(options) -> Job:
    require_free(options.output_dir, options.overwrite, required=False)
    if options.method in _CONFIGS:
        method = options.build(_CONFIGS[options.method], task_type="CAUSAL_LM")
    elif options.method in ("full", "none"):
        method = "full" if options.method == "full" else None
    else:
        raise UsageError("method", f"it must be one of qst, disp, full, none, got {options.method!r}")
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
