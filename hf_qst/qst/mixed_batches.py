"""`adapter_names`: a batch in which each row has its own side network, with PEFT's checks and words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from hf_qst.qst.base_pass import BASE, rows_by_name


@contextmanager
def adapters_by_row(model: nn.Module, layer: nn.Module, names: Sequence[str], arguments: dict) -> Iterator[None]:
    """Inside, each row of a batch is computed by the adapter of its name, `"__base__"` by none.

    Args:
        model: the model with its head.
        layer ([`QSTLayer`])
        names: one for each row of the caller's batch.
        arguments: of the call; those of `generate` say how often it repeats each row.

    Raises:
        TypeError: `names` is no list.
        ValueError: the model is in training mode, or there is no adapter of a name. While it runs: another number of
            rows.
    """
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    if not isinstance(names, (list, tuple)):
        raise TypeError(f"Got adapter names of type {type(names)}, expected a list of str.")
    if unknown := set(names) - {BASE} - set(layer.networks):
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
    repeats = _repeats(arguments)
    names = [name for name in names for _ in range(repeats)]
    handles = [
        module.register_forward_pre_hook(_Names(module, names), with_kwargs=True)
        for module in model.modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
    ]
    try:
        with layer.requested.using(partial(rows_by_name, names)):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _repeats(arguments: dict) -> int:
    """How often `generate` repeats each row: by its beams, or the number of sequences that it samples."""
    settings = arguments.get("generation_config")
    counts = [arguments.get(name, getattr(settings, name, None)) for name in ("num_beams", "num_return_sequences")]
    return max(count or 1 for count in counts)


class _Names:
    """Forward pre-hook that tells a fully trained module (`modules_to_save`) which rows are whose."""

    def __init__(self, wrapper: AuxiliaryTrainingWrapper, names: list[str]):
        # An adapter without such a module of its own uses the base's.
        self.names = [name if name in wrapper._adapters else BASE for name in names]

    def __call__(self, wrapper, args, kwargs):
        return args, {**kwargs, "adapter_names": self.names}
