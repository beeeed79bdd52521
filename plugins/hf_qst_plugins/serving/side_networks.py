"""A frozen base with a QST side network on vLLM's transformers backend.

The side network's attention has keys and values of its own, in cache layers behind those of the base. vLLM's cache holds layers of
several sizes, so both are paged alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.transformers.base import VLLM_ATTN_ATTR

from hf_qst import QSTConfig
from hf_qst.base_model.decoder_stack import DecoderStack, find_decoder_stack
from hf_qst.qst.base_pass import BasePass, Reader
from hf_qst.qst.layer import QSTLayer
from hf_qst.qst.side_network import SideNetwork
from hf_qst_plugins.serving.reshaped_models import ReshapedForCausalLM


class SideTunedForCausalLM(ReshapedForCausalLM):
    """The base in vLLM's folder, whatever its shapes, and the side network in the adapter's folder `config.qst_adapter`.

    Raises:
        ValueError: what is not served with a side network, by its argument.
        CheckpointError: the adapter's file is not the one that was saved, or is of another base.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        folder = getattr(vllm_config.model_config.hf_config, "qst_adapter", None)
        adapter = _servable(folder, vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        network, stack = _load(folder, adapter, self.config)
        # Not a module of this one: it only holds the hooks on the base's blocks.
        self.hooks = (QSTLayer(self.model, replace(stack, module=self.model)),)
        self.side_network = network.to(self.device_config.device)
        for index, block in enumerate(network.blocks, len(stack.blocks)):
            attention, spec = block.attention, block.attention.spec
            attention.config = self.text_config
            served = Attention(
                spec.num_heads,
                spec.head_dim,
                spec.head_dim**-0.5,
                spec.num_kv_heads,
                cache_config=self.cache_config,
                per_layer_sliding_window=attention.sliding_window,
                prefix=f"side_network.layers.{index}.{VLLM_ATTN_ATTR}",
            )
            setattr(attention, VLLM_ATTN_ATTR, served)

    def _decorate_for_torch_compile(self) -> None:
        """Leave the base's class as it is: it is not compiled, and `_load` makes a model of it too."""

    def _create_hf_to_vllm_mapper(self) -> None:
        """By the base's class, for which transformers knows other names of tensors in files."""
        overridden = self.config.architectures
        self.config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.config.model_type]]
        super()._create_hf_to_vllm_mapper()
        self.config.architectures = overridden

    def forward(self, *args, **kwargs) -> torch.Tensor:
        running = BasePass([Reader("default", self.side_network, None, False, None, 0)], grad=False)
        with self.hooks[0].tape.using(running):
            hidden = super().forward(*args, **kwargs)
        return running.leave(hidden.unsqueeze(0)).squeeze(0)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return super().load_weights(weights) | {
            f"side_network.{name}" for name, _ in self.side_network.named_parameters()
        }


def _servable(folder: object, vllm_config: VllmConfig) -> QSTConfig:
    """The adapter's configuration.

    Raises:
        ValueError: naming the argument.
    """
    if not isinstance(folder, str):
        raise ValueError(f'hf_overrides["qst_adapter"] must be the folder of a QST adapter, got {folder!r}')
    adapter = QSTConfig.from_pretrained(folder)
    if not isinstance(adapter, QSTConfig):
        raise ValueError(
            f'hf_overrides["qst_adapter"] must be the folder of a QST adapter, {folder} has {adapter.peft_type}'
        )
    for name, found, served in (
        ("QSTConfig.tail_layers", adapter.tail_layers, 0),
        ("QSTConfig.modules_to_save", adapter.modules_to_save, None),
        ("enforce_eager", vllm_config.model_config.enforce_eager, True),
    ):
        if found != served:
            raise ValueError(f"in vLLM a side network needs {name}={served!r}, got {found!r}")
    return adapter


def _load(folder: str, adapter: QSTConfig, config) -> tuple[SideNetwork, DecoderStack]:
    """The side network of an adapter, checked against its manifest and the base's sizes, and a stack without values."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
    stack = find_decoder_stack(base)
    model = PeftModel.from_pretrained(base, folder, config=adapter)
    return model.base_model.stack_layer.checked("default").eval(), stack
