"""The class that `use_nf4_kernels` gives to 4-bit layers. A module of its own, because it imports bitsandbytes."""

import bitsandbytes.nn
import torch

from hf_qst.packed_weights import nf4_weight
from hf_qst_kernels import nf4_linear
from hf_qst_kernels.dispatch import autocast_dtype, runs_triton
from hf_qst_kernels.nf4 import table_sizes

MAX_ROWS = 64


class Linear4bit(bitsandbytes.nn.Linear4bit):
    """bitsandbytes' layer, of the same name for whoever prints or looks for it, with another product for few rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.numel() // self.in_features
        # The first forward settles the compute type. bitsandbytes' kernels do not follow autocast, ours would.
        autocast = autocast_dtype(x.device.type) is not None
        if not 0 < rows <= MAX_ROWS or not self.compute_type_is_set or autocast:
            return super().forward(x)
        y = x if self.compute_dtype is None else x.to(self.compute_dtype)
        # While a graph is made, the operator goes into it, which asks the same when it runs.
        sizes = table_sizes(rows, self.in_features, self.out_features)
        if not torch.compiler.is_compiling() and not runs_triton("nf4_linear", y, sizes):
            return super().forward(x)
        weight = nf4_weight(self)
        if weight is None:
            return super().forward(x)
        packed, absmax, outputs, *nested = weight
        bias = None if self.bias is None else self.bias.to(y.dtype)
        return nf4_linear(y, packed, absmax, outputs, bias, *nested).to(x.dtype)
