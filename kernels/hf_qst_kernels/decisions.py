"""Names, limits and lookup keys of all ops: arithmetic on shapes and dtypes. Importing this file registers no operator.

`<op>_sizes` gives the sizes by which a call is looked up in a chip's table of measured times, `None` where no Triton
kernel can compute the call. A layer can ask `dispatch.runs_triton` with them before it needs the op.
"""

import torch

FILES = {
    "dequantize_taps": "quantize_taps",
    "linear_cross_entropy": "linear_cross_entropy",
    "linear_index_add": "linear_index_add",
    "norm_gate": "norm_gate",
    "norm_index_select": "norm_index_select",
    "quantize_taps": "quantize_taps",
    "tap_linear": "tap_linear",
}
"""Op -> the file of `ops` that holds it."""

# Channels that share a scale in int8.
TAP_BLOCK = 64
# Outputs whose sums one Triton program can keep in registers for all its rows, by the product's dtype.
TAP_OUTPUTS = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 64}
# The same where rows do not start at 16-byte boundaries: loading entry by entry takes registers.
TAP_OUTPUTS_UNALIGNED = 128
# A program of `norm_gate` holds whole rows in registers.
NORM_GATE_WIDTH = 2048

Sizes = dict[str, int] | None


def norm_gate_sizes(side: torch.Tensor) -> Sizes:
    """For the side network's state `[..., width]`."""
    width = side.shape[-1]
    if side.numel() == 0 or width > NORM_GATE_WIDTH:
        return None
    return {"rows": side.numel() // width, "width": width, "alignment": _alignment(width)}


def norm_index_select_sizes(hidden: torch.Tensor, index: torch.Tensor) -> Sizes:
    """For `hidden [..., dim]` and `index [width]`."""
    dim = hidden.shape[-1]
    return {"rows": hidden.numel() // dim, "dim": dim, "width": index.shape[0]}


def linear_index_add_sizes(rows: int, weight: torch.Tensor) -> Sizes:
    """For `rows` inputs of `weight [width, inputs]`."""
    outputs, inputs = weight.shape
    if rows == 0 or weight.numel() == 0:
        return None
    return {"rows": rows, "inputs": inputs, "outputs": outputs, "alignment": _alignment(inputs)}


def tap_linear_sizes(
    x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, quantized: bool, centered: bool
) -> Sizes:
    """For `x [..., dim]` and `weight [outputs, dim]` with a product in `dtype`; keys are left out where they are usual."""
    outputs, dim = weight.shape[0], x.shape[-1]
    aligned = _alignment(dim, *(tensor.stride(-2) for tensor in (x, weight) if tensor.dim() > 1))
    most = TAP_OUTPUTS.get(dtype, 0)
    if aligned == 1:
        most = min(most, TAP_OUTPUTS_UNALIGNED)
    if x.numel() == 0 or not 0 < outputs <= most:
        return None
    sizes = {"rows": x.numel() // dim, "dim": dim, "outputs": outputs, "alignment": aligned}
    sizes |= {name: 1 for name, there in (("quantized", quantized), ("centered", centered)) if there}
    return sizes if x.dtype == dtype else {**sizes, "product_bits": 8 * dtype.itemsize}


def _alignment(*widths: int) -> int:
    """16 if rows of these widths start at the boundaries that wide loads need, else 1."""
    return 1 if any(width % 16 for width in widths) else 16
