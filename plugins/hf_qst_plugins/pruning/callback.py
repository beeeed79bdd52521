"""The callback for DISP: checks before training, logs and plots during it, hardens and exports after it.

The budget term is inside the model, because a callback gets neither losses nor batches.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from tqdm.auto import tqdm
from transformers import TrainerCallback

from hf_qst.base_model.offloading import is_sharded
from hf_qst.disp import DISPLayer, PruningReport
from hf_qst.disp.start import rows_of, share_start, start_from_scores
from hf_qst.extras import require
from hf_qst.saved.whole_files import is_empty
from hf_qst.tuner.config import is_count, is_number
from hf_qst.tuner.manifest_tuner import with_head
from hf_qst_plugins.pruning.plots import plot_widths

logger = logging.getLogger(__name__)

SCHEDULED = ("keep_ratio", "regularization", "temperature")


class DISPCallback(TrainerCallback):
    """Trains DISP with an ordinary Trainer.

        trainer = Trainer(get_peft_model(model, DISPConfig(keep_ratio=0.5)), ...)
        trainer.add_callback(DISPCallback())
        trainer.train()
        small = trainer.model.merge_and_unload()

    It adds to the Trainer's log (`trainer.state.log_history`): `kept_ratio` (of the last sampled channels),
    `kept_ratio_threshold` (if all channels above the threshold were kept) and `budget_term`. If the two ratios differ
    much, the choice is not settled and hardening will hurt. A step with gradients that are not finite is skipped and
    ends the training.

    Args:
        export_directory (`str`, *optional*):
            New or empty folder for the smaller model. At the end, a copy of the model is pruned and saved there, which
            takes memory for the copy. Needs a model made by `get_peft_model`.
        plot_directory (`str`, *optional*): folder for `widths.png`, the kept widths by layer.
        plot_steps (`int`): steps between two plots.
        schedule (`Callable[[float], dict]`, *optional*):
            Maps the fraction of training done, in [0, 1], to values of `keep_ratio` (of the blocks' matrices),
            `regularization` or `temperature` for the next step. The final choice meets the configuration's budget.
        freeze_at (`float`): fraction of training, in (0, 1], at which the choice is fixed and training ends.
        progress (`bool`): whether to show a progress bar and a summary at the end.

    Raises:
        ValueError: a value out of range. At the start of training: no DISP model, float16, a trainable base, a hardened
            or merged adapter, an export directory that is not empty or cannot be created, or an export of an adapter
            that was added by transformers' own `add_adapter`.
        ImportError: at the start of training, a plot directory without matplotlib.
    """

    def __init__(
        self,
        export_directory: str | os.PathLike | None = None,
        plot_directory: str | os.PathLike | None = None,
        plot_steps: int = 100,
        schedule: Callable[[float], dict] | None = None,
        freeze_at: float = 1.0,
        progress: bool = True,
    ):
        if not is_count(plot_steps):
            raise ValueError(f"plot_steps must be an integer of at least 1, got {plot_steps!r}")
        if not is_number(freeze_at) or not 0 < freeze_at <= 1:
            raise ValueError(f"freeze_at must be in (0, 1], got {freeze_at!r}")
        if schedule is not None and not callable(schedule):
            raise ValueError(f"schedule must be a function of the done part of the training, got {schedule!r}")
        self.export_directory = None if export_directory is None else os.fspath(export_directory)
        self.plot_directory = None if plot_directory is None else os.fspath(plot_directory)
        self.plot_steps, self.schedule, self.freeze_at, self.progress = plot_steps, schedule, freeze_at, progress
        self.report: PruningReport | None = None
        """The report of the hardening, after training."""
        self._layer: DISPLayer | None = None
        self._bar: tqdm | None = None
        self._micro_batches = 0
        self._failed = False

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        self._layer = _disp_layer(model)
        self._check(args, model)
        network = self._layer.active_network()
        if network.awaits_start:
            base = with_head(model)
            data = rows_of(train_dataloader, inspect.signature(base.forward).parameters, network.config.seed)
            start_from_scores(base, network, data)
            share_start(network)
        self._failed, self._start = False, time.monotonic()
        if self.progress and state.is_local_process_zero:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="DISP", unit="step")

    def _check(self, args, model) -> None:
        network = self._layer.active_network()
        if network is None or network.is_hardened:
            raise ValueError(
                "the model's DISP adapter is hardened: training changes nothing. merge_and_unload() gives the smaller model"
                if network
                else "no DISP adapter is active: call set_adapter(name) or enable_adapters()"
            )
        others = [n for n, p in model.named_parameters() if p.requires_grad and "disp_net." not in n]
        if others:
            raise ValueError(
                f"DISP learns for a frozen base, but {others[0]!r} is trainable ({len(others)} such parameters); tune "
                "the smaller model afterwards"
            )
        if getattr(args, "fp16", False):
            raise ValueError("fp16=True scales the loss, which the budget term would not follow; use bf16=True")
        if any(map(is_sharded, model.parameters())):
            self._check_sharded(network)
        if self._layer.merged:
            raise ValueError("the DISP adapter is merged: training changes nothing. Call unmerge_adapter() first")
        if self.export_directory is not None:
            if not hasattr(model, "merge_and_unload"):
                raise ValueError(
                    f"export_directory={self.export_directory!r} needs a model made by get_peft_model(model, "
                    f"DISPConfig(...)), got {type(model).__name__} with an adapter of transformers' own add_adapter. Leave "
                    "it out; hf_qst.prune_blocks(model, masks) cuts such a model down"
                )
            _require_free(self.export_directory)
        if self.plot_directory is not None:
            require("matplotlib", "DISPCallback.plot_directory")

    def _check_sharded(self, network) -> None:
        if network.awaits_start:
            raise ValueError(
                f"DISPConfig.start_scores={network.config.start_scores!r} reads whole weights, and FSDP or ZeRO-3 has divided "
                "them before the callback sees data: give DISPConfig the calibration_data, the same in all processes, or "
                "start_scores='none'"
            )
        if self.export_directory is not None:
            raise ValueError(
                f"export_directory={self.export_directory!r} needs whole weights, and each process holds a part of them (FSDP "
                "or ZeRO-3): save the adapter, load it in one process and export it with merge_and_unload()"
            )

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        length = _length(train_dataloader)
        steps = math.ceil(length / args.gradient_accumulation_steps) if length else 0
        # A resumed epoch skips the batches it has seen.
        self._micro_batches = state.global_step % steps * args.gradient_accumulation_steps if steps else 0

    def on_step_begin(self, args, state, control, train_dataloader=None, **kwargs):
        length = _length(train_dataloader)
        remaining = length - self._micro_batches if length else args.gradient_accumulation_steps
        # The last step of an epoch may have fewer batches.
        self._layer.accumulation_steps = max(1, min(args.gradient_accumulation_steps, remaining))
        self._apply_schedule(state)

    def _apply_schedule(self, state) -> None:
        if self.schedule is None:
            return
        network = self._layer.active_network()
        for name, value in self.schedule(state.global_step / state.max_steps).items():
            if name not in SCHEDULED:
                raise ValueError(f"schedule may set {', '.join(SCHEDULED)}, got {name!r}")
            setattr(network, "keep_share" if name == "keep_ratio" else name, value)

    def on_substep_end(self, args, state, control, **kwargs):
        self._micro_batches += 1

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if not _all_finite([p.grad for p in self._layer.active_network().parameters() if p.grad is not None]):
            logger.error(
                "step %d: the loss or its gradients are not finite. The step is not taken and training ends; the "
                "parameters are those of the step before.",
                state.global_step + 1,
            )
            for parameter in self._layer.active_network().parameters():
                parameter.grad = None
            self._failed = control.should_training_stop = True

    def on_step_end(self, args, state, control, **kwargs):
        self._micro_batches += 1
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)
        if state.global_step % self.plot_steps == 0:
            self._plot(state)
        if self.freeze_at < 1 and state.global_step >= self.freeze_at * state.max_steps:
            control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._layer is None or self._layer.last_ratio is None or "loss" not in (logs or {}):
            return
        network = self._layer.active_network()
        values = {
            "kept_ratio": round(float(self._layer.last_ratio), 5),
            "kept_ratio_threshold": round(network.threshold_ratio(), 5),
            "budget_term": round(float(self._layer.last_penalty), 5),
        }
        logs.update(values)
        state.log_history[-1].update(values)  # the Trainer added this entry before the event
        if self._bar is not None:
            self._bar.set_postfix(
                loss=f"{float(logs['loss']):.3f}",
                kept=f"{values['kept_ratio']:.3f}",
                threshold=f"{values['kept_ratio_threshold']:.3f}",
                budget=f"{network.keep_share:.3f}",
            )

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._layer.accumulation_steps = None
        if self._failed:
            return
        network = self._layer.active_network()
        self.report = PruningReport.of(with_head(model), network)
        network.harden()
        self._plot(state)
        if self.progress and state.is_world_process_zero:
            tqdm.write(f"DISP: {state.global_step} steps in {time.monotonic() - self._start:.0f} s; {self.report}")
        # Sure draws leave 2 points: what they drop of the channels above the threshold.
        if abs(self.report.projected) > 0.03:
            logger.warning(
                "the threshold alone would keep %.2f%% of the blocks' weights; hardening moved that by %+.2f points to "
                "meet the budget. The choice was not settled: train for longer, or expect a loss of quality.",
                100 * self.report.threshold_ratio,
                100 * self.report.projected,
            )
        if self.export_directory is not None and state.is_world_process_zero:
            self._export(model)

    def _export(self, model) -> None:
        _require_free(self.export_directory)
        small = copy.deepcopy(model).merge_and_unload()
        small.save_pretrained(self.export_directory)
        if self.progress:
            size = sum(p.numel() * p.element_size() for p in small.parameters())
            tqdm.write(f"DISP: the smaller model, {size / 1e6:.1f} MB, is in {self.export_directory}")

    def _plot(self, state) -> None:
        if self.plot_directory is None:
            return
        masks = self._layer.active_network().masks()  # under FSDP all processes gather the logits
        if state.is_world_process_zero:
            plot_widths(masks, os.path.join(self.plot_directory, "widths.png"), f"step {state.global_step}")


def _disp_layer(model) -> DISPLayer:
    layer = next((m for m in model.modules() if isinstance(m, DISPLayer)), None) if model is not None else None
    if layer is None:
        raise ValueError(
            f"DISPCallback needs a model made by get_peft_model(model, DISPConfig(...)), got {type(model).__name__}"
        )
    return layer


def _all_finite(gradients: list[torch.Tensor]) -> bool:
    """Whether all gradients are finite, in all processes where each holds a part."""
    if not gradients:
        return True
    sharded = any(map(is_sharded, gradients))
    finite = torch.stack([(g.to_local() if is_sharded(g) else g).isfinite().all() for g in gradients]).all()
    if sharded:
        finite = finite.int()
        dist.all_reduce(finite, dist.ReduceOp.MIN)
    return bool(finite)


def _require_free(directory: str) -> None:
    if os.path.exists(directory) and (not os.path.isdir(directory) or not is_empty(directory)):
        raise ValueError(f"export_directory must be a folder that is not there or empty, {directory!r} is not")
    parent = os.path.abspath(directory)
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent) or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(
            f"export_directory must be a folder that can be made, but nothing can be written to {parent!r}"
        )


def _length(dataloader) -> int | None:
    try:
        return len(dataloader)
    except TypeError:  # an iterable dataset has no length
        return None
