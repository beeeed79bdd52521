"""The side network's keys and values, in cache layers after the base's own in the same `Cache` object.

All operations of a cache (reordering for beam search, cropping for assisted decoding, repeating, resetting) loop over its
layers, so they include the side network's without a subclass. Each side layer has the type of its base layer, so both
have the same length and the base's mask fits.
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
    return isinstance(layer, CacheLayerMixin) and bool(layer.is_initialized) and bool(layer.get_seq_length() > 0)


def with_side_layers(cache: Cache | None, config, num_layers: int, sources: Sequence[int]) -> Cache:
    """The cache to give to the base: `num_layers` of its own, then one for each side block.

    Args:
        cache: the caller's cache, or None for a new dynamic one.
        config: the base's config.
        num_layers: number of the base's blocks.
        sources: for each side block the base block whose attention mask it uses.

    Raises:
        NotImplementedError: a kind of cache whose layers cannot be mirrored.
        ValueError: the cache was filled without this side network (with the adapter disabled or another one, or by another
            model).
    """
    if cache is None:
        cache = DynamicCache(config=config)
    if isinstance(cache, EncoderDecoderCache) or getattr(cache, "offloading", False):
        raise NotImplementedError(
            f"QST does not support {type(cache).__name__} with offloading or cross-attention; use "
            "cache_implementation='dynamic' or 'static'"
        )
    without_side = len(cache.layers) <= num_layers
    filled = not torch.compiler.is_compiling() and any(map(_is_filled, cache.layers[:num_layers]))
    if filled and (len(cache.layers) != num_layers + len(sources) or not _is_filled(cache.layers[num_layers])):
        raise ValueError(
            "past_key_values was filled while this QST adapter was disabled or by another model: it holds no keys and "
            "values of the side network. Start from an empty cache."
        )
    # A DynamicCache made without a config has no layers yet and adds them on demand, also the side network's.
    if without_side and cache.layers:
        cache.layers.extend(_like(cache.layers[source]) for source in sources)
    return cache
