"""Refuses continuous batching by name, which transformers runs in a thread that only logs its errors."""

from __future__ import annotations

from torch import nn

MESSAGE = (
    "QST does not support continuous batching (generate_batch, cache_implementation='paged', "
    "init_continuous_batching, TRL's use_transformers_continuous_batching and use_transformers_paged): its paged cache has "
    "no room for the keys and values of the side network. Use generate() with a dynamic or a static cache."
)


class RefuseContinuousBatching:
    """Stands in the place of `model.init_continuous_batching`, through which all ways to continuous batching go.

    While the adapter is disabled it is the model's own.

    Args:
        model ([`~transformers.PreTrainedModel`]): with its language-model head; other models cannot generate.
        layer ([`QSTLayer`])
    """

    def __init__(self, model: nn.Module, layer: nn.Module):
        self.model, self.layer = model, layer
        if hasattr(type(model), "init_continuous_batching"):
            model.init_continuous_batching = self

    def __call__(self, *args, **kwargs):
        if self.layer.active_network() is not None:
            raise NotImplementedError(MESSAGE)
        return type(self.model).init_continuous_batching(self.model, *args, **kwargs)

    def remove(self) -> None:
        """Give the model its own method back."""
        self.model.__dict__.pop("init_continuous_batching", None)
