"""A clear error for continuous batching, which transformers runs in a thread that only logs its errors."""

from __future__ import annotations

from torch import nn

MESSAGE = (
    "QST does not support continuous batching (generate_batch, cache_implementation='paged', "
    "init_continuous_batching, TRL's use_transformers_continuous_batching and use_transformers_paged): its paged cache has "
    "no room for the keys and values of the side network. Use generate() with a dynamic or a static cache."
)


class RefuseContinuousBatching:
    """Replaces `model.init_continuous_batching`, which every use of continuous batching calls.

    With the adapter disabled it calls the model's own method.

    Args:
        model ([`~transformers.PreTrainedModel`]): the base; without a language-model head nothing is replaced.
        layer ([`QSTLayer`])
    """

    def __init__(self, model: nn.Module, layer: nn.Module):
        self.model, self.layer = model, layer
        if hasattr(type(model), "init_continuous_batching"):
            model.init_continuous_batching = self

    def __call__(self, *args, **kwargs):
        if self.layer.active_networks():
            raise NotImplementedError(MESSAGE)
        return type(self.model).init_continuous_batching(self.model, *args, **kwargs)

    def remove(self) -> None:
        """Restore the model's own method."""
        self.model.__dict__.pop("init_continuous_batching", None)
