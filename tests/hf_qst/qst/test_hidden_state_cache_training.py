"""The hidden-state cache in `Trainer` and `SFTTrainer`: the losses of a run without it, and no base from the second epoch on."""

import pytest
import torch
from torch.utils.data import DataLoader
from trl import SFTConfig, SFTTrainer

from hf_qst import QSTConfig
from hf_qst.qst import HiddenStateCacheConfig, fill_hidden_state_cache, hidden_state_cache
from tests.architectures import side_layers, side_network, side_tuned, tiny, token_batch
from tests.child_processes import CHILD
from tests.toy_data import text_dataset, token_dataset, tokenizer
from tests.trainers import plain_trainer


def logged(run, name="loss"):
    return torch.tensor([entry[name] for entry in run.state.log_history if name in entry])


def tokens_run(model) -> list[int]:
    """The number of tokens of each run of a base block, from now on; of the first, which only looks, and of the check too."""
    tokens = []
    attention = side_layers(model)[0].blocks[0].self_attn
    attention.register_forward_pre_hook(
        lambda _, args, kwargs: tokens.append(kwargs["hidden_states"][..., 0].numel()), with_kwargs=True
    )
    return tokens


def trained(directory, folder, storage="full", data=None, collator=None, **settings):
    """(run, tokens that the base ran) of three epochs of 16 ragged rows."""
    torch.manual_seed(5)
    config = None if folder is None else HiddenStateCacheConfig(folder, storage)
    model = side_tuned("llama", hidden_state_cache=config, tail_layers=settings.pop("tail_layers", 0))
    tokens = tokens_run(model)
    data = token_dataset(16, ragged=True) if data is None else data
    recipe = {"max_steps": -1, "num_train_epochs": 3, "per_device_train_batch_size": 4, "learning_rate": 5e-3}
    run = plain_trainer(model, directory, data, **{**recipe, **settings})
    if collator is not None:
        run.data_collator = collator
    run.train()
    return run, tokens


SETTINGS = {
    "shuffled": {},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
    "tail": {"tail_layers": 1},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_losses_are_those_without_a_cache_and_the_base_runs_for_one_epoch(tmp_path, name):
    plain, all_tokens = trained(tmp_path / "plain", None, **SETTINGS[name])
    cached, tokens = trained(tmp_path / "cached", tmp_path / "states", **SETTINGS[name])
    torch.testing.assert_close(logged(cached), logged(plain), atol=1e-5, rtol=1e-5)
    assert sum(all_tokens) == 3 * 16 * 16
    # One token to look, sixteen rows of sixteen, and one of them again to compare.
    assert sum(tokens) == 1 + 16 * 16 + 16
    assert hidden_state_cache(cached.model).counts.missing == 16


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_losses_in_fewer_bits_are_within_half_a_percent(tmp_path, storage):
    plain, _ = trained(tmp_path / "plain", None)
    cached, _ = trained(tmp_path / "cached", tmp_path / "states", storage)
    torch.testing.assert_close(logged(cached), logged(plain), atol=0, rtol=5e-3)


def test_another_batch_size_in_another_run_computes_nothing(tmp_path):
    first, _ = trained(tmp_path / "first", tmp_path / "states")
    hidden_state_cache(first.model).close()
    run, tokens = trained(tmp_path / "second", tmp_path / "states", per_device_train_batch_size=3, seed=8)
    assert sum(tokens) == 1 + 16
    assert hidden_state_cache(run.model).counts.missing == 0


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_padded_to_the_longest_of_their_batch(tmp_path, side):
    rows = [{"input_ids": row[: 5 + 3 * i]} for i, row in enumerate(token_dataset(4)["input_ids"])]

    def collate(batch):
        # Trainer gives the rows in another order in each epoch, so the padding of a row changes.
        batch = tokenizer().pad(batch, padding_side=side, return_tensors="pt")
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    settings = {"data": rows, "collator": collate, "per_device_train_batch_size": 2, "num_train_epochs": 4}
    plain, _ = trained(tmp_path / "plain", None, **settings)
    cached, _ = trained(tmp_path / "cached", tmp_path / "states", **settings)
    torch.testing.assert_close(logged(cached), logged(plain), atol=1e-5, rtol=1e-5)
    counts = hidden_state_cache(cached.model).counts
    assert counts.missing == 4 if side == "right" else 4 < counts.missing <= 12


def test_evaluation_during_training_is_cached_too(tmp_path):
    settings = {"eval_strategy": "epoch"}
    plain, _ = trained(tmp_path / "plain", None, **settings)
    cached, tokens = trained(tmp_path / "cached", tmp_path / "states", **settings)
    torch.testing.assert_close(logged(cached, "eval_loss"), logged(plain, "eval_loss"), atol=1e-5, rtol=1e-5)
    assert len(logged(cached, "eval_loss")) == 3
    assert sum(tokens) == 1 + 16 * 16 + 16  # of the rows that it trained on


def test_a_resumed_run_reads_what_the_first_stored(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 6}
    straight, _ = trained(tmp_path / "straight", tmp_path / "states", **settings)
    hidden_state_cache(straight.model).close()
    torch.manual_seed(5)
    model = side_tuned("llama", hidden_state_cache=str(tmp_path / "states"))
    run = plain_trainer(
        model,
        tmp_path / "resumed",
        token_dataset(16, ragged=True),
        max_steps=12,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
    )
    run.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-6"))
    assert hidden_state_cache(model).counts.missing == 0
    expected = side_network(straight.model).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in side_network(model).state_dict().items())


def test_noise_of_the_trainer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"NEFTune \(neftune_noise_alpha=5"):
        trained(tmp_path / "out", tmp_path / "states", neftune_noise_alpha=5)
    with pytest.raises(ValueError, match="NEFTune"):
        sft(tmp_path / "sft", tmp_path / "states", neftune_noise_alpha=5).train()


def sft(directory, folder, **settings):
    defaults = {
        "num_train_epochs": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": [], "use_cpu": True,
        "bf16": False, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "max_length": 16,
        "gradient_checkpointing": False, "seed": 3,
    }  # fmt: skip
    torch.manual_seed(5)
    config = QSTConfig(task_type="CAUSAL_LM", r=4, downsample_rank=4, init_weights=False, hidden_state_cache=folder)
    data = text_dataset(16)
    return SFTTrainer(
        tiny("llama"),
        SFTConfig(str(directory), **{**defaults, **settings}),
        train_dataset=data,
        eval_dataset=data if "eval_strategy" in settings else None,
        processing_class=tokenizer(),
        peft_config=config,
    )


SFT = {
    "padded": {},
    "packed": {"packing": True},
    "wrapped": {"packing": True, "packing_strategy": "wrapped"},
    "padding_free": {"padding_free": True, "max_length": None},
    "chunked": {"loss_type": "chunked_nll"},
    "accumulation": {"gradient_accumulation_steps": 2},
    "evaluation": {"eval_strategy": "epoch"},
}


@pytest.mark.parametrize("name", SFT)
def test_supervised_fine_tuning(tmp_path, name):
    runs = []
    for folder in (None, str(tmp_path / "states")):
        run = sft(tmp_path / "out", folder, **SFT[name])
        tokens = tokens_run(run.model)
        run.train()
        runs.append((run, tokens))
    (plain, all_tokens), (cached, tokens) = runs
    assert len(logged(plain)) > 3
    torch.testing.assert_close(logged(cached), logged(plain), atol=1e-5, rtol=1e-5)
    counts = hidden_state_cache(cached.model).counts
    if name != "wrapped":  # which cuts the texts to rows of equal length
        assert counts.missing == 16
        assert counts.found >= 32
    # The first of three epochs, or of three with an evaluation each.
    assert sum(tokens) < 0.55 * sum(all_tokens)


def _one_rank(folder, rank: int) -> None:
    torch.set_num_threads(1)
    model = side_tuned("llama", hidden_state_cache=str(folder)).train()
    for row in token_batch(8, 12)[rank::2]:
        model(input_ids=row[None], labels=row[None]).loss.backward()
    hidden_state_cache(model).close()


def test_processes_share_what_they_store(tmp_path):
    children = [CHILD.Process(target=_one_rank, args=(tmp_path, rank)) for rank in (0, 1)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        assert child.exitcode == 0
    model = side_tuned("llama", hidden_state_cache=str(tmp_path)).train()
    ids = token_batch(8, 12)
    torch.testing.assert_close(
        model(input_ids=ids, labels=ids).loss, side_tuned("llama").train()(input_ids=ids, labels=ids).loss
    )
    assert hidden_state_cache(model).counts.missing == 0


def test_filling_from_a_data_loader_leaves_a_trainer_nothing_to_compute(tmp_path):
    torch.manual_seed(5)
    model = side_tuned("llama", hidden_state_cache=str(tmp_path / "states"))
    run = plain_trainer(
        model, tmp_path, token_dataset(16), max_steps=-1, num_train_epochs=1, per_device_train_batch_size=4
    )
    loader = run.get_train_dataloader()
    assert isinstance(loader, DataLoader)
    assert fill_hidden_state_cache(model, loader, progress=False).stored == 16
    tokens = tokens_run(model)
    run.train()
    assert sum(tokens) == 16  # of one row, compared
    assert hidden_state_cache(model).counts.missing == 0
