"""Device code of `hf_qst`: ops on tensors, each with a torch path, a Triton path and a naive twin. Knows no models.

Importing this package neither imports Triton nor initialises CUDA. An op is registered with `torch.library` when it is
first asked for, because that takes some 20 ms each. All ops are listed in `hf_qst_kernels.registry`.
"""

from importlib import import_module

from .dispatch import use_backend

_MODULES = {
    "NF4Weight": "nf4_weight",
    "dequantize_taps": "taps",
    "linear_cross_entropy": "cross_entropy",
    "linear_index_add": "linear_add",
    "norm_gate": "gated_norm",
    "norm_index_select": "norm_select",
    "quantize_taps": "taps",
    "tap_linear": "taps",
}

__all__ = [
    "NF4Weight",
    "dequantize_taps",
    "linear_cross_entropy",
    "linear_index_add",
    "norm_gate",
    "norm_index_select",
    "quantize_taps",
    "tap_linear",
    "use_backend",
]


def __getattr__(name: str):
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
