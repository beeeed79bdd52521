"""A signal in training saves a checkpoint and then acts; the run goes on from it to the weights of one that was not stopped."""

import os
import signal
import threading

import pytest
import torch
from transformers import TrainerCallback

from hf_qst_plugins.training import StopOnSignalCallback
from tests.conformance.methods import LINES
from tests.toy_data import token_dataset
from tests.trainers import plain_trainer


class SignalAt(TrainerCallback):
    """Sends signals to this process in the middle of a step."""

    def __init__(self, step, number, times=1):
        self.step, self.number, self.times = step, number, times

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


class Stopped(Exception):
    """What the handler of the program itself raises."""


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def number(request):
    def stop(*_):
        raise Stopped

    before = signal.signal(request.param, stop)
    yield request.param
    assert signal.getsignal(request.param) is stop, "the program's own handler is back"
    signal.signal(request.param, before)


def trainer(line, folder, *callbacks, **settings):
    torch.manual_seed(3)
    made = plain_trainer(line.model(), folder, token_dataset(16), max_steps=5, save_strategy="no", **settings)
    for callback in (*callbacks, StopOnSignalCallback()):
        made.add_callback(callback)
    return made


@pytest.mark.parametrize("name", ["qst", "disp", "mixed_rank"])
def test_a_stopped_run_goes_on_to_the_same_weights(name, number, tmp_path, caplog):
    line = LINES[name]
    whole = trainer(line, tmp_path / "whole")
    whole.train()
    with pytest.raises(Stopped):
        trainer(line, tmp_path / "run", SignalAt(2, number)).train()
    assert os.listdir(tmp_path / "run") == ["checkpoint-3"]
    assert f"{number.name}: saved {tmp_path / 'run' / 'checkpoint-3'}" in caplog.text
    resumed = trainer(line, tmp_path / "run")
    resumed.train(resume_from_checkpoint=True)
    for key, parameter in line.own(whole.model).items():
        assert torch.equal(line.own(resumed.model)[key], parameter), key


def test_a_second_signal_acts_at_once(number, tmp_path):
    with pytest.raises(Stopped):
        trainer(LINES["qst"], tmp_path / "run", SignalAt(2, number, times=2)).train()
    assert not (tmp_path / "run" / "checkpoint-3").exists()


def test_after_a_run_that_failed_signals_act_at_once(number, tmp_path):
    class Fail(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise RuntimeError("no more memory")

    failing = trainer(LINES["qst"], tmp_path / "run", Fail())
    with pytest.raises(RuntimeError, match="no more memory"):
        failing.train()
    with pytest.raises(Stopped):
        os.kill(os.getpid(), number)


def test_in_another_thread_training_goes_on_without_it(tmp_path, caplog):
    made = trainer(LINES["qst"], tmp_path / "run")
    thread = threading.Thread(target=made.train)
    thread.start()
    thread.join()
    assert made.state.global_step == 5 and "in another thread than the main one" in caplog.text
