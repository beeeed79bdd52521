"""The adaptive temperature as a class that vLLM loads by its name."""

from __future__ import annotations

from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from hf_qst_plugins.adaptive_temperature import VLLMAdaptiveTemperature

KEY = "adaptive_temperature"
"""Of vLLM's `additional_config`."""
SETTINGS = ("preset", "scope", "language", "tokenizer_name")


class AdaptiveTemperature(VLLMAdaptiveTemperature, LogitsProcessor, LogitsProcessorV2):
    """The paper's rule in both of vLLM's model runners, `logits_processors=["hf_qst_plugins.serving:AdaptiveTemperature"]`.

    `additional_config={"adaptive_temperature": {"preset": "humaneval"}}` sets `preset`, `scope`, `language` and
    `tokenizer_name` for all requests. What a request can set is in [`VLLMAdaptiveTemperature`].

    Raises:
        ValueError: a setting of another name, or a preset, scope or language that does not exist.
    """

    def __init__(self, vllm_config, device, is_pin_memory: bool | None = None):
        for name, value in vllm_config.additional_config.get(KEY, {}).items():
            if name not in SETTINGS:
                raise ValueError(f"additional_config[{KEY!r}] may have {', '.join(SETTINGS)}, got {name!r}")
            setattr(self, name, value)
        super().__init__(vllm_config, device, is_pin_memory)
