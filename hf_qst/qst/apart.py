"""The door to training several side networks on the same batches, for a training loop of one's own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from hf_qst.qst.in_turn import InTurn
from hf_qst.qst.layer import QSTLayer


def learn_apart(model: nn.Module, adapters: Sequence[str] | None = None) -> InTurn:
    """
    Let several QST adapters learn from the same batches, each from its own loss, with one pass of the base a step.

        apart = learn_apart(model, ["slow", "fast"])
        model(**batch).loss.backward()      # the sum of the losses; each is in apart.losses
        for name in apart.names:            # clipping all gradients together would couple the networks
            clip_grad_norm_(apart.parameters(name), 1.0)

    `hf_qst.train_together` does this for a Trainer. It ends with `set_adapter`.

    Args:
        model: with QST adapters, made by PEFT or by transformers' own `add_adapter`.
        adapters (`list[str]`, *optional*): which learn; without it, all. The others are frozen.

    Returns:
        `InTurn`: the names, the losses of the last call, and the parameters by adapter.

    Raises:
        ValueError: no such adapter, or one with a tail.
    """
    layer = next((module for module in model.modules() if isinstance(module, QSTLayer)), None)
    known = [] if layer is None else list(layer.networks)
    names = known if adapters is None else list(dict.fromkeys(adapters))
    if not names or set(names) - set(known):
        raise ValueError(
            f"adapters must name QST adapters of the model, {', '.join(map(repr, known)) or 'none'}, got {names}"
        )
    layer.refuse_tails(names, "these blocks would compute something else for each adapter")
    layer.in_turn.start(model, names)
    return layer.in_turn
