"""bitsandbytes' 4-bit layers of a model with our kernel where it is faster."""

from __future__ import annotations

import sys

from torch import nn


def use_nf4_kernels(model: nn.Module, enabled: bool = True) -> int:
    """
    Let the NF4 layers of `model` take `hf_qst_kernels.nf4_linear` where its kernel was measured to win.

    That is for inputs of up to 64 rows (a decoding step of as many sequences), where a table for this GPU says so
    (`docs/kernels.md`, "Which implementation runs"); else, and under autocast, a layer runs bitsandbytes' own forward.
    Without a table nothing changes. Weights, `state_dict()`, `isinstance(layer, bnb.nn.Linear4bit)` and adapters on the
    layers stay as they are, and calling it again does nothing more. It may come before or after `get_peft_model`, but
    after the model was loaded.

    Args:
        model (`torch.nn.Module`): a model with bitsandbytes `Linear4bit` layers; changed in place.
        enabled (`bool`): `False` gives all of them their own forward back.

    Returns:
        `int`: how many layers that are: of type NF4, in blocks of 64, with a multiple of 64 inputs. 0 for a model that
        has none, which is no error.

    Raises:
        TypeError: `model` is no module, or `enabled` no bool.

    Example:

    ```python
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=BitsAndBytesConfig(load_in_4bit=True, ...))
    use_nf4_kernels(model)
    ```
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled must be True or False, got {enabled!r}")
    if "bitsandbytes" not in sys.modules:  # nobody has its layers without it
        return 0
    from hf_qst.few_rows_linear4bit import Linear4bit as FewRows

    theirs = FewRows.__base__
    layers = [layer for layer in model.modules() if type(layer) in (theirs, FewRows) and _is_nf4(layer)]
    for layer in layers:
        layer.__class__ = FewRows if enabled else theirs
    return len(layers)


def _is_nf4(layer: nn.Module) -> bool:
    """What a layer is made for; whether its weights can be read now is asked in each forward."""
    weight = layer.weight
    kind = getattr(weight, "quant_type", None), getattr(weight, "blocksize", None)
    return kind == ("nf4", 64) and layer.in_features % 64 == 0
