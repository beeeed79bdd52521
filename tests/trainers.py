"""The real `Trainer` with settings for tests."""

from transformers import Trainer, TrainingArguments, default_data_collator

from tests.toy_data import token_dataset


def plain_trainer(model, directory, data=None, eval_data=None, **settings):
    """A `Trainer` on the CPU at a constant learning rate, without reports; `settings` go to its arguments."""
    defaults = {
        "per_device_train_batch_size": 8,
        "max_steps": 10,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        "lr_scheduler_type": "constant",
    }
    arguments = TrainingArguments(str(directory), **{**defaults, **settings})
    data = token_dataset() if data is None else data
    eval_data = data if eval_data is None else eval_data
    return Trainer(model, arguments, train_dataset=data, eval_dataset=eval_data, data_collator=default_data_collator)
