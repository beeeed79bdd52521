"""Device code of `hf_qst`: ops on tensors, each with a torch reference and a Triton path. Knows nothing of models.

Importing this package registers the ops with `torch.library`; it neither imports Triton nor initialises CUDA.
"""

from .cross_entropy import linear_cross_entropy
from .dispatch import use_backend
from .taps import dequantize_taps, quantize_taps, tap_linear

__all__ = ["dequantize_taps", "linear_cross_entropy", "quantize_taps", "tap_linear", "use_backend"]
