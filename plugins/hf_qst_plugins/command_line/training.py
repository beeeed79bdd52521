"""A training by the ordinary Trainer, whose options are Trainer's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import peft_model, set_peft_model_state_dict
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from hf_qst import plan
from hf_qst.planning import PlanError
from hf_qst_plugins.inputs import Collator, model_path, quantization_config
from hf_qst_plugins.training import StopOnSignalCallback

from .arguments import Arguments
from .errors import one_line
from .folders import checkpoint_to_resume, step_of
from .measures import pad_token_id

# Of Trainer's own 5e-5, three epochs, and reports to whatever is installed, none suits these methods.
DEFAULTS = {"learning_rate": 2e-3, "num_train_epochs": 1.0, "logging_steps": 10, "report_to": "none"}


def add_training(arguments: Arguments, **defaults) -> None:
    """Trainer's options, `--resume` and `--overwrite`."""
    # --resume finds the checkpoint, and Trainer itself does nothing with the others.
    arguments.add(TrainingArguments, skip={"resume_from_checkpoint", "do_train", "do_eval", "do_predict"})
    arguments.parser.set_defaults({**DEFAULTS, **defaults})
    arguments.flag("resume", "Go on from the last whole checkpoint in --output_dir.")
    arguments.flag("overwrite", "Discard what is in --output_dir.")


def training_arguments(options) -> tuple[TrainingArguments, Path | None]:
    """Trainer's arguments, and the checkpoint to go on from.

    Raises:
        UsageError: a value is refused, or the folder is taken.
    """
    checkpoint = checkpoint_to_resume(options.output_dir, options.resume, options.overwrite)
    more = {} if "dataloader_pin_memory" in options.given else {"dataloader_pin_memory": options.use_cpu is False}
    return options.build(TrainingArguments, **more), checkpoint


def expected(options, method, settings: TrainingArguments) -> list[str]:
    """What a step of the training should take, by `hf_qst.plan`; the reason where it cannot tell."""
    quantization = quantization_config(options.quantization, torch.bfloat16)
    try:
        made = plan(
            model_path(options.model), method, settings.per_device_train_batch_size, options.max_length,
            str(settings.device), gradient_checkpointing=settings.gradient_checkpointing,
            quantization_config=quantization, search=False,
        )  # fmt: skip
    except PlanError as error:
        return [f"no plan of a step: {one_line(error)}"]
    return ["", *str(made).splitlines()]


def train(model, settings: TrainingArguments, rows, held_out, tokenizer, checkpoint, callbacks: Sequence = ()) -> dict:
    """Train; returns the log and what it took, JSON-ready."""
    trainer = Trainer(
        model,
        settings,
        train_dataset=rows,
        eval_dataset=held_out,
        data_collator=Collator(pad_token_id(tokenizer)),
        callbacks=[*callbacks, StopOnSignalCallback()],
    )
    if checkpoint is not None and 0 < settings.max_steps <= step_of(checkpoint):
        # All steps are done, and Trainer would make one more before it looked.
        # Not the function of `peft` itself, which checks no manifest.
        set_peft_model_state_dict(model, peft_model.load_peft_weights(str(checkpoint)))
        trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        return _record(trainer, checkpoint, 0.0)
    result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return _record(trainer, checkpoint, result.metrics["train_runtime"])


def _record(trainer: Trainer, checkpoint: Path | None, seconds: float) -> dict:
    return {
        "steps": trainer.state.global_step,
        "resumed_from": None if checkpoint is None else checkpoint.name,
        "seconds": round(seconds, 2),
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "log": [row for row in trainer.state.log_history if "loss" in row or "eval_loss" in row],
    }
