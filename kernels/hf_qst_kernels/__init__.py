"""Device code of `hf_qst`: ops on tensors, each with a torch path, a Triton path and a naive twin. Knows no models.

Importing this package neither imports Triton nor initialises CUDA. An op is registered with `torch.library` when it is
first asked for, because that takes some 20 ms each.
"""

from importlib import import_module

from .decisions import FILES
from .dispatch import use_backend
from .nf4_weight import NF4Weight

__all__ = ["NF4Weight", "use_backend", *FILES]


def __getattr__(name: str):
    if name in FILES:
        op = globals()[name] = getattr(import_module(f"{__name__}.ops.{FILES[name]}"), name)
        return op
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
