"""A prompt that is prefilled once and continued under several side networks."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer

from hf_qst.qst.base_pass import BASE, rows_by_name
from hf_qst.qst.cache import RowsLayer, owner_of
from hf_qst.qst.layer import QSTLayer
from hf_qst.tuner.manifest_tuner import with_head


class SharedPrompt:
    """The caches of a prompt: the base's, which is the same for all adapters, and each side network's.

    Args:
        cache: of a call in which several side networks read one pass of the base.
        adapters: their names.
    """

    def __init__(self, cache: Cache, adapters: Sequence[str]):
        self._cache, self.adapters = cache, tuple(adapters)

    def cache(self, adapter_names: str | Sequence[str]) -> Cache:
        """
        A new cache for `model.generate(..., past_key_values=cache)`, whose `input_ids` begin with the prompt.

        Args:
            adapter_names (`str` or `list[str]`):
                One name is for all rows, with `set_adapter(name)` or, for `"__base__"`, `disable_adapter()`. A list is for
                the same `adapter_names` in the call: one for each row of the prompt, or, if the prompt is one row, for
                each row that continues it.

        Raises:
            ValueError: an adapter that the prompt was not prefilled for, or another number of names than rows.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if unknown := set(names) - {*self.adapters, BASE}:
            raise ValueError(
                f"adapter_names must be among those of prefill(), {', '.join(map(repr, (*self.adapters, BASE)))}, got "
                f"{', '.join(map(repr, sorted(unknown)))}"
            )
        shared = copy.copy(self._cache)
        shared.layers = [_copied(layer) for layer in self._cache.layers]
        if isinstance(adapter_names, str):
            shared.layers = [layer for layer in shared.layers if owner_of(layer)[0] in (None, adapter_names)]
            return shared
        if self._rows == 1 != len(names):
            shared.batch_repeat_interleave(len(names))
        layers = [layer for layer in shared.layers if owner_of(layer)[0] is None]
        for name, rows in rows_by_name(names, len(names) if self._rows == 1 else self._rows):
            for layer in shared.layers:
                if owner_of(layer)[0] != name:
                    continue
                if rows is not None:
                    layer = copy.copy(layer)
                    layer.batch_select_indices(torch.tensor(rows.indices))
                    layer = RowsLayer(layer, rows.indices)
                layers.append(layer)
        shared.layers = layers
        return shared

    @property
    def _rows(self) -> int:
        return next(len(layer.keys) for layer in self._cache.layers if owner_of(layer)[0] is not None)


def _copied(layer):
    """A layer that goes on by itself. A dynamic one grows by concatenation, so the prompt's tensors are shared."""
    return copy.copy(layer) if isinstance(layer, DynamicLayer) else copy.deepcopy(layer)


def _positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """[batch, seq], as `generate` counts them: padding has none."""
    return (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 0)


@torch.no_grad()
def prefill(model: nn.Module, adapters: Sequence[str], **inputs) -> SharedPrompt:
    """
    Run a prompt once through the base, and the side networks of several adapters over what they read of it.

        prompt = prefill(model, ["legal", "medical"], input_ids=ids)
        names = ["legal", "medical", "__base__"]
        model.generate(input_ids=questions, adapter_names=names, past_key_values=prompt.cache(names))

    Args:
        model: a model with QST adapters, in evaluation mode.
        adapters (`list[str]`): names of those that may continue the prompt; the base always may.
        inputs: of the model's forward: `input_ids` [batch, seq] and, for padded rows, `attention_mask`.

    Raises:
        ValueError: no such adapter, one with a tail, a model in training mode or with its adapters disabled.
    """
    layer = next((module for module in model.modules() if isinstance(module, QSTLayer)), None)
    if layer is None or model.training or not layer.active_networks():
        raise ValueError(
            "prefill needs a model with QST adapters that are not disabled, in evaluation mode, got "
            f"{type(model).__name__}"
        )
    names = [name for name in dict.fromkeys(adapters) if name != BASE]
    unknown = [name for name in names if name not in layer.networks]
    if unknown or not names:
        raise ValueError(
            f"adapters must be names of the model's, {', '.join(map(repr, layer.networks))}, got {list(adapters)}"
        )
    layer.refuse_tails(names, "the prompt's keys and values in these blocks would be of one adapter")
    base = with_head(model)
    known = inspect.signature(type(base).forward).parameters
    if "attention_mask" in inputs and "position_ids" in known:
        inputs.setdefault("position_ids", _positions(inputs["attention_mask"]))
    if "logits_to_keep" in known:
        inputs["logits_to_keep"] = 1
    with layer.requested.using(lambda batch: [(name, None) for name in names]):
        output = base(**inputs, use_cache=True)
    return SharedPrompt(output.past_key_values, names)
