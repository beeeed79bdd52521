"""The real `Trainer` with settings for tests."""

import torch
from transformers import Trainer, TrainingArguments, default_data_collator

from hf_qst import DISPCallback
from tests.pruned_models import network
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


def disp_trainer(model, directory, callback=None, data=None, **settings):
    """`plain_trainer` at a rate at which DISP learns fast, with its callback unless that is False."""
    recipe = {"learning_rate": 3e-3, "weight_decay": 0.05, "max_grad_norm": 0.0}
    run = plain_trainer(model, directory, data, token_dataset(8, seed=1), **{**recipe, **settings})
    if callback is not False:
        run.add_callback(DISPCallback(progress=False) if callback is None else callback)
    return run


def disp_state(model):
    """Copies of all tensors of a model's selection network."""
    return {name: tensor.detach().clone() for name, tensor in network(model).state_dict().items()}


def assert_states_close(left, right, **tolerance):
    """Compare two dicts of tensors, and name the one that differs."""
    assert left.keys() == right.keys() and left
    for name in left:
        torch.testing.assert_close(left[name], right[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)
