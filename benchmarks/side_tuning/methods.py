"""The methods the side-tuning benchmark compares, and one training step of each."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, ShadowConfig, get_peft_model
from torch import nn

from benchmarks.common.measure import synchronize
from hf_qst import QSTConfig
from hf_qst.planning import SavedForBackward

# The best of `--sweep` on the demo's base and text, benchmarks/results/side_tuning_demo_sweep.json.
QST_LR = 8e-3
QST_R2_LR = 2e-3
LORA_LR = 4e-3
SHADOW_LR = 8e-3

LORA_RANK = 16
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Args:
        label: as printed.
        make: base -> PEFT model; `calibration` batches are for methods that look at data before they start.
        lr: learning rate of its loss curve.
        main: rows that are timed in every round and measured for peak RSS and loss; the others are variants.
        runs_base: whether the base is only run forward, in eval mode.
    """

    label: str
    make: Callable[[nn.Module, list[dict]], nn.Module]
    lr: float
    main: bool = True
    runs_base: bool = False


def _qst(config: Callable[..., QSTConfig] = QSTConfig, **changes):
    def make(base, calibration):
        more = {"calibration_data": calibration} if changes.get("downsample") == "principal" else {}
        return get_peft_model(base, config(task_type="CAUSAL_LM", **changes, **more))

    return make


def _tail(base, calibration):
    layers = base.config.num_hidden_layers
    return get_peft_model(base, QSTConfig(task_type="CAUSAL_LM", tail_layers=max(1, layers // 3)))


def _qlora(checkpointing: bool):
    def make(base, calibration):
        # No prepare_model_for_kbit_training: it casts norms and embeddings to float32, which they already are on CPU,
        # and turns checkpointing on.
        config = LoraConfig(
            task_type="CAUSAL_LM", r=LORA_RANK, lora_alpha=2 * LORA_RANK, lora_dropout=0.0, target_modules="all-linear"
        )
        model = get_peft_model(base, config)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        return model

    return make


def _shadow(base, calibration):
    # PEFT's defaults (a one-layer mirror of the base at full width, r=8) without dropout, as for the others.
    return get_peft_model(base, ShadowConfig(task_type="CAUSAL_LM", shadow_dropout=0.0))


def _variant(label: str, lr: float = QST_LR, config=QSTConfig, **changes) -> Method:
    return Method(label, _qst(config, **changes), lr, main=False, runs_base=True)


METHODS = {
    "qst": Method("QST", _qst(), QST_LR, runs_base=True),
    "qst-r2": _variant("QST, r=2, principal", QST_R2_LR, r=2, downsample="principal"),
    "qst-principal": _variant("QST, principal", downsample="principal"),
    "qst-avgpool": _variant("QST, average pooling", downsample="avgpool"),
    "qst-full-taps": _variant("QST, full taps", tap_storage="full"),
    "qst-recompute": _variant("QST, blocks recomputed", side_checkpointing=True),
    "qst-no-recompute": _variant("QST, no recomputation", side_checkpointing=False),
    "qst-paper": _variant("QST, paper's settings", config=QSTConfig.paper),
    "qst-tail": Method("QST, a tail of a third", _tail, QST_LR, main=False),
    "qlora": Method("QLoRA", _qlora(False), LORA_LR),
    "qlora-ckpt": Method("QLoRA, checkpointed", _qlora(True), LORA_LR),
    "shadow": Method("ShadowPEFT", _shadow, SHADOW_LR),
}


def autocast(device: torch.device):
    """bfloat16 on a GPU, as training there is done; nothing elsewhere."""
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()


class Run:
    """A method on a base, ready to train.

    Args:
        method: a row of `METHODS`, or one like it.
        base: a model of its own (`copy_of`).
        device: of the batches.
        calibration: see `Method`.
        lr: in place of the method's.
    """

    def __init__(self, method: Method, base: nn.Module, device: torch.device, calibration: list[dict], lr=None, seed=0):
        self.method, self.device = method, device
        torch.manual_seed(seed)
        self.model = method.make(base, calibration).train()
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.lr = method.lr if lr is None else lr
        # Trainer's default optimiser, and its clipping of gradients in `step`.
        self.optimizer = torch.optim.AdamW(self.trainable, lr=self.lr, weight_decay=0.0, fused=True)

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        """Mean loss of ids [batch, seq] as their own labels."""
        with autocast(self.device):
            return self.model(input_ids=ids, labels=ids, use_cache=False).loss

    def step(self, ids: torch.Tensor, lr_scale: float = 1.0) -> None:
        """One training step, the optimiser's included, waited for."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * lr_scale
        self.loss(ids).backward()
        nn.utils.clip_grad_norm_(self.trainable, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        synchronize(self.device)

    def saved_bytes(self, ids: torch.Tensor, head: bool) -> dict[str, int]:
        """Bytes kept for backward at the end of forward and at most; `head` includes the loss head's."""
        with SavedForBackward(self.model) as saved:
            output = self.loss(ids) if head else self._stack_output(ids)
            forward = saved.live
            output.backward(None if head else torch.randn_like(output))
        self.optimizer.zero_grad(set_to_none=True)
        return {"forward": forward, "peak": saved.peak}

    def _stack_output(self, ids: torch.Tensor) -> torch.Tensor:
        """The output of the decoder stack, caught at the head so that every method's own hooks run."""
        model, caught = self.model.get_base_model(), []

        def catch(head, args):
            caught.append(args[0])
            raise _Caught

        handle = model.get_output_embeddings().register_forward_pre_hook(catch)
        try:
            with autocast(self.device):
                model(input_ids=ids, use_cache=False)
        except _Caught:
            pass
        finally:
            handle.remove()
        return caught[0]

    def count(self) -> int:
        return sum(parameter.numel() for parameter in self.trainable)

    def file_bytes(self) -> int:
        """Size of the adapter's weights as `save_pretrained` writes them."""
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            return (Path(folder) / "adapter_model.safetensors").stat().st_size

    @torch.no_grad()
    def held_out_loss(self, rows: torch.Tensor, batch: int = 8) -> float:
        """Mean nats per predicted token of rows [n, seq]."""
        # Training mode stays on: no method has dropout here, and bitsandbytes may change a base in eval mode.
        total, count = 0.0, 0
        for part in rows.split(batch):
            part = part.to(self.device)
            with autocast(self.device):
                logits = self.model(input_ids=part, use_cache=False).logits
            logits, targets = logits[:, :-1].float().flatten(0, 1), part[:, 1:].flatten()
            total += nn.functional.cross_entropy(logits, targets, reduction="sum").double().item()
            count += targets.numel()
        return total / count


class _Caught(Exception):
    pass


class Floor:
    """The least such a method can do: one bare forward of the base, and the frozen head's input gradient."""

    def __init__(self, base: nn.Module, device: torch.device):
        self.base, self.device = base.eval(), device

    @torch.no_grad()
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The base's decoder stack alone, [batch, seq, d]."""
        with autocast(self.device):
            hidden = self.base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        synchronize(self.device)
        return hidden

    def step(self, ids: torch.Tensor) -> None:
        hidden = self.forward(ids).requires_grad_()
        with autocast(self.device):
            logits = self.base.get_output_embeddings()(hidden)[:, :-1].flatten(0, 1).float()
            nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).backward()
        synchronize(self.device)
