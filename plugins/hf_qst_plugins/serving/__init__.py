"""Reshaped models and the adaptive temperature in vLLM 0.32.

vLLM finds `register` by itself where this package is installed beside it, and takes the class by its name:

    vllm serve FOLDER --logits-processors hf_qst_plugins.serving:AdaptiveTemperature
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_qst_plugins.serving.registration import register

if TYPE_CHECKING:
    from hf_qst_plugins.serving.adaptive_temperature import AdaptiveTemperature

__all__ = ["AdaptiveTemperature", "register"]


def __getattr__(name: str) -> type:
    # Imports vLLM, which is looked for only by who asks for it.
    if name == "AdaptiveTemperature":
        from hf_qst_plugins.serving.adaptive_temperature import AdaptiveTemperature

        return AdaptiveTemperature
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
