"""A user's program as a type checker reads it. It is not run: `test_public_types.py` gives it to mypy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, assert_type

from transformers import PreTrainedModel, Trainer

import hf_qst
from hf_qst import (
    AdaptiveTemperatureLogitsProcessor,
    DISPCallback,
    DISPConfig,
    MixedRankConfig,
    QSTConfig,
    adaptive_generate_kwargs,
    train_together,
)
from hf_qst.errors import BudgetError, CheckpointError
from hf_qst_plugins.code_evaluation import Problem, Report, evaluate, pass_at_k, read_problems


def configurations(batches: list[Mapping[str, object]]) -> None:
    assert_type(QSTConfig(task_type="CAUSAL_LM", tail_layers=2).tail_layers, int)
    assert_type(QSTConfig.paper().readout_rank, int)
    assert_type(DISPConfig(keep_ratio=0.5).keep_ratio, float)
    assert_type(MixedRankConfig(keep_ratio=0.5, calibration_data=batches).keep_ratio, float)
    DISPCallback(export_directory="small", plot_steps=10)


def models(model: PreTrainedModel, batches: list[Mapping[str, object]]) -> None:
    assert_type(hf_qst.__version__, str)
    assert_type(hf_qst.supported_models(), dict[str, dict[str, str]])
    hf_qst.register_architecture("my_llama", "llama")
    hf_qst.plan(model, "qst", batch=1, sequence=512)
    hf_qst.compress_model(model, MixedRankConfig(keep_ratio=0.5), batches)
    assert_type(hf_qst.rank_report(model), list[dict[str, Any]])
    try:
        assert_type(hf_qst.prune_model(model, "flap", calibration_data=batches), PreTrainedModel)
        assert_type(hf_qst.quantize_experts(hf_qst.to_dense(model)), PreTrainedModel)
    except (BudgetError, CheckpointError) as error:
        assert_type(str(error), str)


def training(trainer: Trainer) -> None:
    train_together(trainer, ["slow", "fast"], learning_rates={"fast": 1e-3})


def decoding(model: PreTrainedModel, tokenizer: object, folder: Path) -> None:
    AdaptiveTemperatureLogitsProcessor(tokenizer, block_temperature=0.8)
    assert_type(adaptive_generate_kwargs(tokenizer, preset="humaneval"), dict[str, Any])
    assert_type(read_problems(folder), list[Problem])
    assert_type(evaluate(model, tokenizer, read_problems(), samples=2), Report)
    assert_type(pass_at_k(10, [1, 2], 5), float)


def mistakes() -> None:
    QSTConfig(tail_layer=2)  # type: ignore[call-arg]
    QSTConfig(tail_layers="2")  # type: ignore[arg-type]
    DISPCallback(plot_step=10)  # type: ignore[call-arg]
    pass_at_k("10", [1], 1)  # type: ignore[arg-type]
