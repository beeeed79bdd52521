"""What a training is expected to take, said once before its first step."""

from __future__ import annotations

import inspect
import logging

import torch
import torch.distributed

from hf_qst.base_model.offloading import is_offloaded, is_sharded

logger = logging.getLogger(__name__)

SECONDS = 5.0  # that a plan may take before it is given up


class Announcement:
    """Forward pre-hook of a transformers model: logs the plan of the first training forward, and warns if it will not fit.

    It never refuses. On a CPU, where there is no device to fill, it plans only if the log takes its line. Whatever hinders
    a plan is a line of the debug log.
    """

    def __init__(self):
        self.said = False

    def __call__(self, model, args, kwargs) -> None:
        # A compiler must not see what follows.
        if torch.compiler.is_compiling() or self.said or not (model.training and torch.is_grad_enabled()):
            return
        self.said = True
        device = next(model.parameters()).device
        if device.type != "cuda" and not logger.isEnabledFor(logging.INFO):
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
            return
        try:
            announce(model, _inputs(model, args, kwargs), device)
        except Exception as error:
            logger.debug("no plan of this training: %s: %s", type(error).__name__, error)


def announce(model, inputs: dict, device: torch.device) -> None:
    """Log what a training step of `model` on `inputs` is expected to take.

    Raises:
        PlanError, ValueError: there is no plan; the message says why.
    """
    # Loaded for the first training alone.
    from hf_qst.planning.chips import chip_of
    from hf_qst.planning.planner import Planner, Run
    from hf_qst.planning.table import gigabytes

    if any(map(is_sharded, model.parameters())):
        raise ValueError("its parameters are sharded")
    if is_offloaded(model):
        raise ValueError("its weights are offloaded")
    rows, tokens = next(v.shape[:2] for v in inputs.values() if isinstance(v, torch.Tensor) and v.dim() > 1)
    chip = chip_of(device if device.type == "cuda" else "cpu")
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    run = Run(model, None, rows, tokens, chip, False, False, "adamw", None, False, model.dtype, autocast)
    plan = Planner(run, padded="attention_mask" in inputs, limit=SECONDS).plan(inputs, timed=False)
    sizes = ", ".join(f"{kind} {gigabytes(size)}" for kind, size in plan.bytes.items())
    trained, every = plan.parameters["trained"], sum(plan.parameters.values()) - plan.parameters["trained"]
    message = (
        f"{plan.method} trains {trained:,} of {every:,} parameters. A step on {rows} rows of {tokens} tokens is expected to "
        f"take {gigabytes(plan.total)} ({sizes}; with AdamW)"
    )
    if chip.usable is not None and plan.total > chip.usable:
        logger.warning(
            "%s. %s has %s, %s of them for a run: it will probably not fit. hf_qst.plan(model.config, ...) says which "
            "options save memory.",
            message, chip.name, gigabytes(chip.memory), gigabytes(chip.usable),
        )  # fmt: skip
    else:
        logger.info("%s.", message)


def _inputs(model, args, kwargs) -> dict:
    """The arguments of a call by name, without an attention mask that hides nothing."""
    inputs = {**dict(zip(inspect.signature(type(model).forward).parameters, (model, *args), strict=False)), **kwargs}
    inputs.pop("self", None)
    mask = inputs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dim() == 2 and bool((mask != 0).all()):
        del inputs["attention_mask"]
    return {**inputs, "use_cache": False} if inputs.get("use_cache") is None else inputs
