"""Blocks of the base that return a known state in place of computing one.

The stack's own forward still makes masks, rotary tables and whatever else its blocks are given, and still does what follows
them. The hooks of the blocks run as always.
"""

from __future__ import annotations

import torch
from torch import nn

from hf_qst.tuner.running_forward import ForwardInPlace, RunningForward


class ReplaceableForward(ForwardInPlace):
    """The forward of base block `index` while its layer has a cache.

    It asks the recorder of the running forward for the block's output. The form of what the block returns (a state, or a
    tuple with a state in front) is seen when the block runs, which it must once before. What else a tuple holds, such as
    attention weights, is None then.
    """

    def __init__(self, index: int, block: nn.Module, tape: RunningForward):
        super().__init__(block, tape)
        self.index = index
        self.form: tuple[type, int] | None = None  # of a tuple or list, and how many entries it had
        self.hands_on = (
            False  # whether it returned tensors beside the state and attention weights [batch, heads, seq, seq]
        )

    def __call__(self, *args, **kwargs):
        recorder = self.tape.current
        entering = args[0] if args else kwargs["hidden_states"]
        state = None if recorder is None else recorder.replaced(self.index, entering)
        if state is None:
            output = self.forward(*args, **kwargs)
            self.form = (type(output), len(output)) if isinstance(output, (tuple, list)) else None
            others = () if self.form is None else output[1:]
            self.hands_on = any(isinstance(part, torch.Tensor) and part.dim() != 4 for part in others)
            return output
        if self.form is None:
            return state
        kind, entries = self.form
        return kind([state, *[None] * (entries - 1)])
