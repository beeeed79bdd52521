"""What vLLM is told when it starts: the classes that serve reshaped models and side networks."""

from __future__ import annotations

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_qst.reshaped_models.classes import CLASS_PREFIX

SIDE_TUNED = "SideTunedForCausalLM"
"""Architecture of a base with a side network, which no `config.json` names: a user overrides the base's with it."""


def register() -> None:
    """Tell vLLM about reshaped models and side networks.

    vLLM calls it in each of its processes, by the entry point `vllm.general_plugins`. A second call changes nothing.
    """
    from vllm import ModelRegistry

    for name in sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())):
        # Not the class itself: its module imports what may initialise CUDA, too early for a plugin.
        ModelRegistry.register_model(
            f"{CLASS_PREFIX}{name}", "hf_qst_plugins.serving.reshaped_models:ReshapedForCausalLM"
        )
    ModelRegistry.register_model(SIDE_TUNED, f"hf_qst_plugins.serving.side_networks:{SIDE_TUNED}")
