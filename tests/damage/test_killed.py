"""`kill -9` at random moments: what is on disk afterwards is the old or the new state, whole, and a later run goes on.

`--kills` says how many processes of each kind are killed; a few by default, 50 and more with `make test-damage`.
"""

import os
import random
import shutil
import time
from functools import partial

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from hf_qst.errors import CheckpointError
from hf_qst.saved.whole_files import finish_interrupted, remove_abandoned, whole_file, whole_files, write_text
from hf_qst_plugins.code_evaluation import read_samples
from hf_qst_plugins.code_evaluation.samples_file import SamplesFile
from tests.child_processes import CHILD
from tests.conformance.methods import LINES, logits, small
from tests.reshaped_toys import reshaped


@pytest.fixture
def kills(request):
    return request.config.getoption("--kills")


def _work(begun, work, arguments) -> None:
    torch.set_num_threads(1)
    begun.set()
    work(*arguments)


def killed(work, *arguments, draw: random.Random, longest: float) -> None:
    """Run `work`, a function of this file, in a process of its own and kill it at a random moment."""
    begun = CHILD.Event()
    process = CHILD.Process(target=_work, args=(begun, work, arguments))
    process.start()
    assert begun.wait(60)
    time.sleep(draw.uniform(0, longest))
    process.kill()
    process.join()


def two_models(make) -> dict:
    """By seed."""
    return {seed: make(seed) for seed in (1, 2)}


def save_in_turns(make, folder, settings) -> None:
    """Without an end: the model of seed 2, that of seed 1, and so on."""
    models = two_models(make)
    while True:
        for seed in (2, 1):
            models[seed].save_pretrained(folder, **settings[seed])


def random_reshaped(seed: int):
    model = reshaped(num_hidden_layers=2)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def random_adapter(line: str, seed: int):
    return LINES[line].random(seed=seed)


def test_a_saved_model_is_the_old_or_the_new_one(kills, tmp_path):
    models = two_models(random_reshaped)
    expected = {seed: logits(model) for seed, model in models.items()}
    folder = tmp_path / "model"
    # One in one file, the other in shards: each save also removes files of the other.
    settings = {1: {"max_shard_size": "1GB"}, 2: {"max_shard_size": "60KB"}}
    models[1].save_pretrained(folder, **settings[1])
    found = set()
    for kill in range(kills):
        killed(save_in_turns, random_reshaped, folder, settings, draw=random.Random(kill), longest=0.4)
        loaded = logits(AutoModelForCausalLM.from_pretrained(folder))
        same = [seed for seed, wanted in expected.items() if torch.equal(loaded, wanted)]
        assert same, kill
        found.update(same)
    assert found == {1, 2} or kills < 10
    models[1].save_pretrained(folder)
    for name in os.listdir(folder):
        os.utime(folder / name, (0, 0))
    remove_abandoned(folder)
    assert not [name for name in os.listdir(folder) if name.startswith(".")]


@pytest.mark.parametrize("line", ["qst", "disp", "mixed_rank"])
def test_an_adapter_is_whole_or_refused(line, kills, tmp_path):
    """PEFT writes the weights in place before a method may write its file, so a kill in between is seen, not undone."""
    make = partial(random_adapter, line)
    models = two_models(make)
    expected = {seed: logits(model) for seed, model in models.items()}
    folder = tmp_path / "adapter"
    models[1].save_pretrained(folder)
    refused = 0
    for kill in range(kills):
        killed(save_in_turns, make, folder, {1: {}, 2: {}}, draw=random.Random(kill), longest=0.2)
        try:
            loaded = logits(PeftModel.from_pretrained(small(), folder))
        except CheckpointError:
            refused += 1
        except Exception as error:  # safetensors' own, for a file that ends in the middle
            assert "safetensors" in type(error).__module__ or "header" in str(error), error
            refused += 1
        else:
            assert any(torch.equal(loaded, wanted) for wanted in expected.values())
        models[1].save_pretrained(folder)
    assert refused < kills


def go_on(path) -> None:
    sample = {"completion": "return 1\n" * 200, "program_parses": True, "outcome": "passed", "detail": ""}
    with SamplesFile(path, {"seed": 0}) as file:
        for number in range(len(file.samples), 10**6):
            file.append({**sample, "task_id": str(number), "sample": 0, "tokens": number, "seconds": 0.0})


def test_a_killed_evaluation_keeps_every_whole_sample(kills, tmp_path):
    path = tmp_path / "samples.jsonl"
    done = 0
    for kill in range(kills):
        killed(go_on, path, draw=random.Random(kill), longest=0.1)
        if path.exists() and path.stat().st_size:
            found = [record["task_id"] for record in read_samples(path)[1]]
            assert found == [str(number) for number in range(len(found))] and len(found) >= done
            done = len(found)
    assert done


def trainer(folder, **settings):
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(96).reshape(8, 12) % 60]
    model = LINES["qst"].model()
    torch.manual_seed(4)
    arguments = TrainingArguments(
        folder, max_steps=6, save_steps=1, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], disable_tqdm=True,
        use_cpu=True, logging_strategy="no", **settings,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=rows)


def train(folder) -> None:
    trainer(folder).train()


def test_a_killed_training_run_goes_on_and_ends_as_if_it_had_not_been(kills, tmp_path):
    whole = trainer(tmp_path / "whole")
    whole.train()
    wanted = {name: parameter.detach().clone() for name, parameter in LINES["qst"].own(whole.model).items()}
    for kill in range(max(1, kills // 4)):
        folder = tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        killed(train, folder, draw=random.Random(kill), longest=2.0)
        while True:
            last = get_last_checkpoint(folder)
            run = trainer(folder)
            try:
                run.train(resume_from_checkpoint=last)
                break
            except (
                Exception
            ) as error:  # the checkpoint that was being written: named, removed, and the one before it used
                assert (last is not None and os.path.basename(last) in str(error)) or "header" in str(error), error
                shutil.rmtree(last)
        for name, parameter in LINES["qst"].own(run.model).items():
            assert torch.equal(parameter, wanted[name]), (kill, name)


def test_what_long_dead_processes_left_is_removed_and_nothing_else(tmp_path):
    dead = os.fork()
    if dead == 0:
        os._exit(0)
    os.waitpid(dead, 0)
    host = os.uname().nodename
    names = {f".tmp_{host}_{dead}_old": True, f".tmp_{host}_{os.getpid()}_mine": False, ".tmp_elsewhere_1_x": False}
    for name in names:
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / f".tmp_{host}_{dead}_new").write_text("")  # a minute ago: its number may be of another container
    write_text(tmp_path / "file.json", "{}")
    left = {name for name in os.listdir(tmp_path) if name.startswith(".tmp_")}
    assert left == {name for name, removed in names.items() if not removed} | {f".tmp_{host}_{dead}_new"}


def test_an_interrupted_move_is_finished_by_the_next(tmp_path):
    (tmp_path / "old.bin").write_text("old")
    (tmp_path / "a").write_text("old")

    class Killed(BaseException):
        pass

    with pytest.raises(Killed), whole_files(tmp_path, replaced=lambda name: name == "old.bin") as staging:
        for name in "ab":
            write_text(os.path.join(staging, name), "new")
        raise Killed
    assert sorted(os.listdir(tmp_path)) == ["a", "old.bin"] and (tmp_path / "a").read_text() == "old"
    complete = tmp_path / ".new_host_1_x"
    complete.mkdir()
    (complete / "b").write_text("new")
    (complete / ".replaced").write_text("old.bin")
    assert finish_interrupted(tmp_path) and not finish_interrupted(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "nowhere" / "x"):
        pass
