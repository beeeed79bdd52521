"""Reshaped models on vLLM's transformers backend.

The backend builds the model with transformers' classes on the meta device, puts vLLM's linear layers, embeddings, norms and
attention in the place of theirs, and loads the files into these. The heads of a reshaped model are the architecture's, so
vLLM's attention and its cache of keys and values are too; only the linear layers have sizes of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.transformers import TransformersForCausalLM

from hf_qst.reshaped_models import ReshapedConfig
from hf_qst.reshaped_models.classes import require_saved_class
from hf_qst.reshaped_models.folder import check_folder

SERVED = (
    "cohere2", "cwm", "gemma", "gemma2", "gemma3_text", "glm4", "gpt_neox", "llama", "ministral3", "mistral", "olmo", "olmo2",
    "olmo3", "phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2",
)  # fmt: skip
"""Types of models that the tests compare with transformers. Of others the backend may lose what their head does: it leaves
out the factor that Granite divides its logits by."""


class ReshapedForCausalLM(TransformersForCausalLM):
    """A causal language model some of whose modules may have other shapes than their architecture's.

    Raises:
        ValueError: what is not served, by its argument.
        CheckpointError: the folder's files are not those that were saved.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        _require_served(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if getattr(self.config, "saved_class", None) is not None:
            require_saved_class(type(self.model), self.config)

    def recursive_replace(self) -> None:
        _separate_classes(self.model)
        super().recursive_replace()

    def init_parameters(self, module: nn.Module, dtype: torch.dtype | None = None) -> None:
        super().init_parameters(module, dtype)
        # The index tensors of pruned modules, which are made where their module's parameters were.
        for part in module.modules():
            for name, buffer in part.named_buffers(recurse=False):
                if buffer.is_meta:
                    setattr(part, name, torch.empty_like(buffer, device=self.device_config.device))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        if isinstance(self.config, ReshapedConfig):
            hub = {"revision": self.model_config.revision, "cache_dir": self.vllm_config.load_config.download_dir}
            check_folder(self.model_config.model, self.config.reshaped_modules, **hub)
        return super().load_weights(weights)


def _require_served(vllm_config: VllmConfig) -> None:
    """Raises ValueError: naming the argument and what is served."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if (found := model.hf_config.model_type) not in SERVED:
        raise ValueError(
            f"hf_qst serves models of the types {', '.join(SERVED)} in vLLM, got {found}. Of a reshaped model, "
            "hf_qst.to_dense(model) is the same function in the architecture's own shapes"
        )
    for argument, found, served in (
        ("quantization", model.quantization, None),
        ("tensor_parallel_size", parallel.tensor_parallel_size, 1),
        ("pipeline_parallel_size", parallel.pipeline_parallel_size, 1),
    ):
        if found != served:
            raise ValueError(f"hf_qst's models in vLLM need {argument}={served!r}, got {found!r}")


def _separate_classes(model: nn.Module) -> None:
    """Give modules with reshaped children a class of their own.

    vLLM decides once for each class and names of children whether linear layers can be joined (query, key and value; gate
    and up), and looks at single modules only for sizes. A factorised layer has the sizes but is no linear layer.
    """
    for module in list(model.modules()):
        reshaped = frozenset(name for name, child in module.named_children() if hasattr(child, "describe"))
        if reshaped:
            module.__class__ = _subclass(type(module), reshaped)


@functools.cache
def _subclass(plain: type[nn.Module], reshaped: frozenset[str]) -> type[nn.Module]:
    """A class like `plain`, another one for each set of children that are `reshaped`."""
    return type(plain.__name__, (plain,), {"__module__": plain.__module__})
