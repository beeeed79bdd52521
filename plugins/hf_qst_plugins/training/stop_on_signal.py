"""Training that is interrupted or terminated saves a checkpoint first."""

from __future__ import annotations

import logging
import os
import signal
import threading

import torch
import transformers.trainer
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)


class StopOnSignalCallback(TrainerCallback):
    """The first SIGINT or SIGTERM ends training after the step that runs, and saves a checkpoint; a second acts at once.

        trainer.add_callback(StopOnSignalCallback())
        trainer.train()                                     # Ctrl-C: saves, says where, and raises KeyboardInterrupt
        trainer.train(resume_from_checkpoint=True)          # goes on from there

    After the checkpoint the signal does what it would have done: an interrupt raises `KeyboardInterrupt`, SIGTERM ends the
    process unless there is a handler for it. With several processes all stop after the same step, for which they exchange
    one number a step. Handlers belong to a process's main thread; in another thread this does nothing, and says so.

    Args:
        signals (`tuple[signal.Signals, ...]`): those to wait for.
    """

    def __init__(self, signals: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM)):
        self.signals = tuple(map(signal.Signals, signals))
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self._restore()
        self.received = None
        if threading.current_thread() is not threading.main_thread():
            logger.warning(
                "StopOnSignalCallback: training runs in another thread than the main one, signals act at once"
            )
            return
        for number in self.signals:
            self._before[number] = signal.signal(number, self._receive)

    def _receive(self, number, frame):
        if self.received is not None or not _in_training(frame):
            self._restore()
            signal.raise_signal(number)
            return
        self.received = signal.Signals(number)
        # A handler may run inside a write to the same stream, which print and logging do not allow; this does.
        os.write(2, f"\n{self.received.name}: a checkpoint follows this step. Once more stops at once.\n".encode())

    def on_step_end(self, args, state, control, **kwargs):
        if _any_process(self.received, args):
            # A process that got no signal itself stops with the others.
            self.received = self.received or signal.SIGTERM
            control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        if self.received is not None and state.is_world_process_zero:
            folder = os.path.join(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            logger.warning("%s: saved %s; training ends here", self.received.name, folder)

    def on_train_end(self, args, state, control, **kwargs):
        self._restore()
        if self.received is not None:
            signal.raise_signal(self.received)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}


def _in_training(frame) -> bool:
    """Whether a Trainer runs: after one that ended by an error the handlers are still there."""
    while frame is not None:
        if frame.f_code.co_filename == transformers.trainer.__file__:
            return True
        frame = frame.f_back
    return False


def _any_process(received, args) -> bool:
    """Whether this process or another got a signal."""
    if args.world_size == 1:
        return received is not None
    flag = torch.tensor(int(received is not None), device=args.device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag)
