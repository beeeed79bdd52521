"""The configuration of quantized side tuning."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, ClassVar

from hf_qst.qst.hidden_states.config import HiddenStateCacheConfig
from hf_qst.tuner.config import MethodConfig, is_count, is_number

DOWNSAMPLE_KINDS = ("linear", "lora", "adapter", "maxpool", "avgpool", "principal")
MIX_KINDS = ("residual", "paper", "sigmoid")
# What adapters were before these fields were added, and the paper's.
BEFORE = {"side_every": 1, "readout_rank": 0, "downsample_input_norm": False}


@dataclass
class QSTConfig(MethodConfig):
    """Configuration of quantized side tuning (QST).

    A frozen base runs forward only. A side network, `r` times narrower, reads its hidden states and is the only part that
    is trained, unless `tail_layers` adds LoRA in the base's last blocks. Zhang et al., "Quantized Side Tuning", ACL 2024, arXiv 2401.07159. The defaults learn faster and need less
    memory than the paper's (fewer and wider side blocks, the readout, `mix`, `tap_storage`, `side_heads`).
    `QSTConfig.paper()` has the paper's settings, `QSTConfig.reference()` those of the authors' code.

    Args:
        r (`int`, *optional*):
            Reduction factor: the side network is `hidden_size // r` wide. Must divide the base's hidden size. None
            chooses the width nearest to a sixth of the base's that has heads of 32 channels or more.
        side_every (`int`):
            Every how many base blocks there is a side block, counted from the last; 1 is a side block for each.
        readout_rank (`int`):
            Rank of the readout: a low-rank function of the base's states, added to the side network's output. It starts
            at zero. 0 leaves it out.
        readout_every (`int`):
            Every how many base blocks their output is read by it, counted from the last.
        tail_layers (`int`):
            How many of the last base blocks learn too, by low-rank updates of their linear layers (LoRA). The backward
            pass runs through these blocks and no further; the side network and the readout read the blocks below them. 0
            differentiates nothing in the base; the number of blocks, less one, is nearly LoRA in all of it. Gradient
            checkpointing, as the user asks for it, is of these blocks.
        tail_rank (`int`):
            Rank of these updates.
        downsample (`str`):
            Map of a hidden state `[batch, seq, hidden]` to `[batch, seq, hidden // r]`: `"linear"`, `"lora"` (two
            factors), `"adapter"` (two factors with SiLU in between), `"maxpool"` or `"avgpool"` (over `r` channels, no
            parameters), `"principal"` (a fixed projection onto the principal directions of each block's outputs; see
            `calibration_data`).
        downsample_rank (`int`):
            Rank of the factors of `"lora"` and `"adapter"`.
        downsample_input_norm (`bool`):
            Divide a state by its root mean square before a trainable downsampler reads it: states of large models have
            outliers in the thousands.
        downsample_layernorm (`bool`):
            Layer norm after the downsampling.
        downsample_dropout (`float`):
            Dropout after the downsampling.
        tap_storage (`str`):
            Format in which a trainable downsampler keeps the base's hidden state for the backward pass: `"int8"` (in
            blocks of 64 channels) or `"full"`. The forward pass is exact with both.
        side_heads (`str`):
            `"auto"` keeps the base's head size and divides the number of heads; `"keep"` keeps the number of heads and
            divides their size.
        gate_shape (`str`):
            Gate between a downsampled hidden state and the side network's state: `"scalar"` (one per layer) or
            `"vector"` (one per channel).
        gate_init (`float`):
            Initial value of the gates before the sigmoid.
        mix (`str`):
            Mix of the outputs of base and side network before the head. `"residual"`: `alpha * base + side`, where the
            side network's last layer starts at zero. `"paper"`: `alpha * base + (1 - alpha) * side`, where alpha starts
            at 1. `"sigmoid"`: the same, where alpha is the sigmoid of a parameter that starts at 1. With the first two,
            training starts exactly at the base model.
        mix_shape (`str`):
            `"scalar"` or `"vector"` (one alpha per channel).
        mix_lr_scale (`float`):
            Multiplies the learning rate of alpha: alpha is `start + mix_lr_scale * parameter`.
        side_checkpointing (`bool` or `str`):
            Part of each side block that the backward pass recomputes: `"mlp"` (most of the activations, less than half
            of the time), `True` (the whole block, least memory) or `False` (nothing).
        chunked_loss (`bool`):
            In training, compute the language-model loss from the frozen head in chunks of tokens, without the full
            logits. The model then returns a loss and no logits; pass `logits_to_keep=0` to get them. A model whose loss
            is another function of its hidden states keeps its own.
        modules_to_save (`list[str]`, *optional*):
            Modules outside the decoder stack to train and save in full, for example `["score"]`.
        hidden_state_cache (`str` or [`HiddenStateCacheConfig`], *optional*):
            A folder for the base's hidden states: they are computed once for each example, and later epochs read them in
            place of running the base. Not saved.
        calibration_data (iterable of `dict`, *optional*):
            A few batches of model inputs for `downsample="principal"`. Without them the directions are random and
            orthonormal. Not saved.
    """

    r: int | None = field(default=None, metadata={"help": "The side network is hidden_size // r wide; None: auto."})
    side_every: int = field(default=5, metadata={"help": "Every how many base blocks there is a side block."})
    readout_rank: int = field(default=16, metadata={"help": "Rank of the readout of the base's states; 0: none."})
    readout_every: int = field(default=3, metadata={"help": "Every how many base blocks the readout reads."})
    tail_layers: int = field(default=0, metadata={"help": "How many of the last base blocks learn by LoRA."})
    tail_rank: int = field(default=16, metadata={"help": "Rank of LoRA in these blocks."})
    downsample: str = field(default="adapter", metadata={"help": f"One of {', '.join(DOWNSAMPLE_KINDS)}."})
    downsample_rank: int = field(default=16, metadata={"help": "Rank of the lora and adapter downsamplers."})
    downsample_input_norm: bool = field(default=True, metadata={"help": "RMS norm before the downsampling."})
    downsample_layernorm: bool = field(default=True, metadata={"help": "Layer norm after the downsampling."})
    downsample_dropout: float = field(default=0.0, metadata={"help": "Dropout after the downsampling."})
    tap_storage: str = field(default="int8", metadata={"help": "Format of a kept hidden state: int8 or full."})
    side_heads: str = field(default="auto", metadata={"help": "auto: the base's head size; keep: its head count."})
    gate_shape: str = field(default="scalar", metadata={"help": "scalar or vector."})
    gate_init: float = field(default=0.0, metadata={"help": "Initial value of the gates before the sigmoid."})
    mix: str = field(default="residual", metadata={"help": f"One of {', '.join(MIX_KINDS)}."})
    mix_shape: str = field(default="scalar", metadata={"help": "scalar or vector."})
    mix_lr_scale: float = field(default=1.0, metadata={"help": "Multiplies the learning rate of the mix's alpha."})
    side_checkpointing: bool | str = field(
        default="mlp",
        metadata={"help": "Recompute each side block's MLP ('mlp'), all of it (True) or nothing (False)."},
    )
    chunked_loss: bool = field(default=True, metadata={"help": "Training loss from the frozen head in chunks."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules outside the decoder stack to train and save in full."}
    )
    hidden_state_cache: Any = field(
        default=None, compare=False, metadata={"help": "Folder in which the base's states are kept. Not saved."}
    )
    calibration_data: Any = field(
        default=None, repr=False, compare=False, metadata={"help": "Batches for downsample='principal'. Not saved."}
    )
    target_modules: Any = field(
        default=None, init=False, repr=False, compare=False, metadata={"help": "Set to the decoder stack's path."}
    )

    method: ClassVar[str] = "QST"
    card_remark: ClassVar[str] = (
        "It is a side network, which cannot be merged into the base model; the base stays as it is and is needed to run it."
    )
    not_saved: ClassVar[tuple[str, ...]] = ("calibration_data", "hidden_state_cache", "target_modules")
    memory_options: ClassVar[dict[str, object]] = {
        "side_checkpointing": True,
        "downsample": "avgpool",
        "tap_storage": "int8",
        "chunked_loss": True,
        "tail_layers": 0,
    }

    def __post_init__(self):
        super().__post_init__()
        self._require("r", self.r is None or is_count(self.r), "an integer >= 1 or None")
        for name in ("side_every", "readout_every"):
            self._require(name, is_count(getattr(self, name)), "an integer >= 1")
        for name in ("readout_rank", "tail_layers"):
            self._require(name, is_count(getattr(self, name), 0), "an integer >= 0")
        self._require("tail_rank", is_count(self.tail_rank), "an integer >= 1")
        self._require("downsample", self.downsample in DOWNSAMPLE_KINDS, f"one of {', '.join(DOWNSAMPLE_KINDS)}")
        self._require("downsample_rank", is_count(self.downsample_rank), "an integer >= 1")
        dropout = self.downsample_dropout
        self._require("downsample_dropout", is_number(dropout) and 0 <= dropout < 1, "a number in [0, 1)")
        self._require("tap_storage", self.tap_storage in ("int8", "full"), "int8 or full")
        self._require("side_heads", self.side_heads in ("auto", "keep"), "auto or keep")
        self._require("gate_shape", self.gate_shape in ("scalar", "vector"), "scalar or vector")
        self._require("mix", self.mix in MIX_KINDS, f"one of {', '.join(MIX_KINDS)}")
        self._require("mix_shape", self.mix_shape in ("scalar", "vector"), "scalar or vector")
        self._require("gate_init", is_number(self.gate_init), "a finite number")
        self._require("mix_lr_scale", is_number(self.mix_lr_scale) and self.mix_lr_scale > 0, "positive and finite")
        whole = isinstance(self.side_checkpointing, bool)
        self._require("side_checkpointing", whole or self.side_checkpointing == "mlp", "True, False or 'mlp'")
        for name in ("downsample_input_norm", "downsample_layernorm", "chunked_loss"):
            self._require(name, isinstance(getattr(self, name), bool), "True or False")
        names = self.modules_to_save
        is_list = names is None or (isinstance(names, (list, tuple)) and all(isinstance(n, str) for n in names))
        self._require("modules_to_save", is_list, "a list of module names or None")
        cache = self.hidden_state_cache
        if cache is not None:
            folder = isinstance(cache, (HiddenStateCacheConfig, str, os.PathLike)) and cache != ""
            self._require("hidden_state_cache", folder, "the path of a folder, a HiddenStateCacheConfig, or None")
            self.hidden_state_cache = HiddenStateCacheConfig.of(cache)
        if self.calibration_data is not None and self.downsample != "principal":
            raise ValueError(
                f"QSTConfig.calibration_data is only used by downsample='principal', got downsample={self.downsample!r}"
            )

    @classmethod
    def paper(cls, **changes) -> QSTConfig:
        """The settings of the paper: a side block for each base block, its mix, full-precision taps and no readout;
        heads as the authors' code has them."""
        return cls(**{**BEFORE, "r": 16, "mix": "paper", "side_heads": "keep", "tap_storage": "full", **changes})

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs) -> dict:
        """The fields of a saved configuration; those that it does not have are as they were when it was written."""
        values = super().from_json_file(path_json_file, **kwargs)
        return values if "side_every" in values else {**BEFORE, **values}

    @classmethod
    def reference(cls, **changes) -> QSTConfig:
        """The settings of the authors' released code, which differ from the paper's.

        A vector gate starts at sigmoid(0.5). A vector mix starts with weight sigmoid(1) on the base, so training does not
        start at the base model. The number of heads is undivided, and taps are full-precision.
        """
        code = {"gate_shape": "vector", "gate_init": 0.5, "mix": "sigmoid", "mix_shape": "vector"}
        return cls.paper(**{**code, **changes})
