"""A model for lm-evaluation-harness that loads adapters and smaller models of this package.

Importing this module registers it as `hf_qst`:

    import hf_qst_plugins.lm_evaluation
    lm_eval.simple_evaluate("hf_qst", model_args="pretrained=smaller,peft=tuned,quantization=nf4", tasks=["wikitext"])

It needs `pip install lm-eval`.
"""

from .model import HFQSTModel

__all__ = ["HFQSTModel"]
