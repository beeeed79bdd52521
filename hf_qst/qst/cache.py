"""The side network's keys and values, in cache layers after the base's own in the same `Cache` object.

All operations of a cache (reordering for beam search, cropping for assisted decoding, repeating, resetting) loop over its
layers, so they include the side network's without a subclass. Each side layer has the type of its base layer, so both
have the same length and the base's mask fits. A cache may have the layers of several side networks, each for all rows of
the batch or for some of them (`RowsLayer`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)


class RowsLayer:
    """A cache layer with some rows of a batch, which takes part in operations on all rows.

    What it does not define is the layer's own.

    Args:
        layer: the cache layer that holds the rows.
        rows: their numbers in the batch, ascending.
    """

    def __init__(self, layer, rows: Sequence[int]):
        self.layer, self.rows = layer, list(rows)

    def __getattr__(self, name: str):
        # A cache compares the batch sizes of its layers, where they have one.
        if name == "batch_size" or "layer" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.layer, name)

    def _places(self, rows: torch.Tensor) -> torch.Tensor:
        """Where these rows of the batch are in this layer."""
        return torch.searchsorted(torch.tensor(self.rows, device=rows.device), rows)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        # A beam takes the place of another of the same prompt, so of the same side network.
        self.layer.reorder_cache(self._places(beam_idx[self.rows]))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.layer.batch_repeat_interleave(repeats)
        self.rows = [row * repeats + i for row in self.rows for i in range(repeats)]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        inside = torch.isin(indices, torch.tensor(self.rows, device=indices.device))
        self.layer.batch_select_indices(self._places(indices[inside]))
        self.rows = inside.nonzero().flatten().tolist()


def _like(layer):
    if isinstance(layer, StaticSlidingWindowLayer):
        return StaticSlidingWindowLayer(layer.max_cache_len, layer.max_cache_len)
    if isinstance(layer, StaticLayer):
        return StaticLayer(layer.max_cache_len)
    if isinstance(layer, DynamicSlidingWindowLayer):
        copy = DynamicSlidingWindowLayer(layer.sliding_window)
        copy.record_past = layer.record_past
        return copy
    if isinstance(layer, DynamicLayer):
        return DynamicLayer()
    raise NotImplementedError(
        f"QST cannot keep its keys and values beside a cache layer of type {type(layer).__name__}; use a dynamic or a "
        "static cache (cache_implementation='dynamic' or 'static')"
    )


def _is_filled(layer) -> bool:
    return (
        isinstance(layer, (CacheLayerMixin, RowsLayer))
        and bool(layer.is_initialized)
        and bool(layer.get_seq_length() > 0)
    )


def owner_of(layer) -> tuple[str | None, list[int] | None]:
    """The name of the side network that a cache layer is of (None for one of the base), and the rows that it holds (None
    for all)."""
    return getattr(layer, "side_network", None), getattr(layer, "rows", None)


def with_side_layers(
    cache: Cache | None, config, num_layers: int, owners: Sequence[tuple[str, list[int] | None, Sequence[int]]]
) -> Cache:
    """The cache to give to the base: `num_layers` of its own, then one for each side block.

    Args:
        cache: the caller's cache, or None for a new dynamic one.
        config: the base's config.
        num_layers: number of the base's blocks.
        owners: of each side network its name, its rows (None for all) and for each side block the base block whose
            attention mask it uses.

    Raises:
        NotImplementedError: a kind of cache whose layers cannot be mirrored.
        ValueError: the cache was filled without these side networks (with the adapter disabled, others or for other rows,
            or by another model).
    """
    if cache is None:
        cache = DynamicCache(config=config)
    if isinstance(cache, EncoderDecoderCache) or getattr(cache, "offloading", False):
        raise NotImplementedError(
            f"QST does not support {type(cache).__name__} with offloading or cross-attention; use "
            "cache_implementation='dynamic' or 'static'"
        )
    # A DynamicCache made without a config has no layers yet.
    while len(cache.layers) < num_layers and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    wanted = [(name, rows) for name, rows, sources in owners for _ in sources]
    # Of an adapter whose rows were all left out, there is nothing to keep.
    cache.layers[num_layers:] = [layer for layer in cache.layers[num_layers:] if getattr(layer, "rows", None) != []]
    present = [owner_of(layer) for layer in cache.layers[num_layers:]]
    filled = not torch.compiler.is_compiling() and any(map(_is_filled, cache.layers[:num_layers]))
    if filled and wanted and (present != wanted or not _is_filled(cache.layers[num_layers])):
        raise ValueError(
            f"past_key_values was filled without the QST adapter {owners[0][0]!r}, for other rows, or by another model: it "
            "holds no keys and values of the side network. Start from an empty cache."
        )
    if present != wanted:
        del cache.layers[num_layers:]
        for name, rows, sources in owners:
            for source in sources:
                layer = _like(cache.layers[source])
                layer.side_network = name
                cache.layers.append(layer if rows is None else RowsLayer(layer, rows))
    return cache
