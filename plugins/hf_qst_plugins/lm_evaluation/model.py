"""lm-evaluation-harness's transformers model, for the names and folders of this package."""

from __future__ import annotations

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

import hf_qst  # noqa: F401  (registers the methods with PEFT and the reshaped models with transformers)
from hf_qst_plugins.inputs import load_model, model_path


@register_model("hf_qst")
class HFQSTModel(HFLM):
    """A model by name or a loaded one.

    Args:
        pretrained (`str` or `PreTrainedModel`): see `hf_qst_plugins.inputs.model_path`; or a model, with or without adapters.
        peft (`str`, *optional*): folder or hub name of an adapter on a model by name.
        quantization (`str`, *optional*): `"nf4"` or `"int8"`, for a model by name.
        device (`str`, *optional*): by default the first GPU, else the CPU.
        tokenizer (*optional*): needed for a loaded model.
        kwargs: of `HFLM`.
    """

    def __init__(
        self,
        pretrained,
        peft: str | None = None,
        quantization: str | None = None,
        device=None,
        tokenizer=None,
        **kwargs,
    ):
        if isinstance(pretrained, str):
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(model_path(pretrained))
            pretrained = load_model(pretrained, quantization, device, peft)
        elif tokenizer is None:
            raise ValueError("tokenizer must be given with a loaded model, got None")
        super().__init__(pretrained=pretrained, backend="causal", tokenizer=tokenizer, **kwargs)
