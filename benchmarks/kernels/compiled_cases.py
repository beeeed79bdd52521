"""Every specialisation of every Triton kernel that is worth compiling without a device.

Each function yields a name, the kernel, the types of its arguments as `compiled.compiled` takes them, and the options of
the launch.
"""

from collections.abc import Iterator

import torch

from hf_qst_kernels.decisions import NORM_GATE_WIDTH, TAP_BLOCK, TAP_OUTPUTS, TAP_OUTPUTS_UNALIGNED
from hf_qst_kernels.ops import linear_cross_entropy_triton as cross_entropy
from hf_qst_kernels.ops import linear_index_add_triton as index_add
from hf_qst_kernels.ops import norm_gate_triton as gate
from hf_qst_kernels.ops import norm_index_select_triton as select
from hf_qst_kernels.ops import quantize_taps_triton as quantise
from hf_qst_kernels.ops import tap_linear_triton as taps

Case = tuple[str, object, dict, dict]


def linear_cross_entropy() -> Iterator[Case]:
    floats = {"labels": "*i64", "losses": "*fp32", "ignore_index": "i32", "smoothing": "fp32", "softcap": "fp32"}
    for dtype, vocab in (("bf16", 131072), ("fp16", 4097), ("fp32", 100), ("bf16", 1)):
        # Triton makes a constexpr of an integer argument that is 1
        sizes = {"row_stride": "i64", "vocab": "i32"} if vocab > 1 else {"row_stride": 1, "vocab": 1}
        for everything in (True, False):
            flags = {"SOFTCAP": everything, "SMOOTH": everything, "GRAD": everything}
            name = f"linear_cross_entropy {'all options' if everything else 'loss only'} vocab {vocab} {dtype}"
            yield (
                name,
                cross_entropy.cross_entropy_rows,
                {"logits": f"*{dtype}", **sizes, **floats, **flags},
                cross_entropy.launch_options(vocab),
            )


def quantize_taps() -> Iterator[Case]:
    shape = {"blocks": "i32", "blocks_per_row": "i32", "dim": "i32", "scales": "*fp32", "q": "*i8"}
    for dtype, block in (("bf16", 64), ("fp32", 64), ("fp16", 24)):
        types = {"x": f"*{dtype}", "out": f"*{dtype}", "x_stride": "i64", "tiny": "fp32", **shape}
        yield f"quantize_taps block {block} {dtype}", quantise.quantize_blocks, types, quantise.launch_options(block)
        yield (
            f"dequantize_taps block {block} {dtype}",
            quantise.dequantize_blocks,
            types,
            quantise.launch_options(block),
        )
    ones = {**shape, "blocks": 1, "blocks_per_row": 1, "dim": 1, "x": "*fp32", "x_stride": 1, "tiny": "fp32"}
    yield "quantize_taps one number fp32", quantise.quantize_blocks, ones, quantise.launch_options(64)


def tap_linear() -> Iterator[Case]:
    tap = {
        "x_stride": "i64:16",
        "weight_stride": "i64:16",
        "center": "*fp32",
        "q": "*i8",
        "scales": "*fp32",
        "rows": "i32",
        "tiny": "fp32",
    }
    tap |= {"dim": "i32:16", "outputs": "i32:16", "UPCAST": False, "BLOCK": TAP_BLOCK}
    odd = {"x_stride": "i64", "weight_stride": "i64", "dim": "i32", "outputs": "i32"}
    uses = (
        ("", True, False),
        (" centered", True, True),
        (" no copy", False, False),
        (" centered no copy", False, True),
    )
    for dtype, options in (("bf16", taps.CONFIGURATIONS["tap_linear"]), ("fp32", [taps.SMALL])):
        for width in (16, TAP_OUTPUTS[torch.float32 if dtype == "fp32" else torch.bfloat16]):
            for use, quantize, center in uses:
                types = {**tap, **dict.fromkeys(("x", "weight", "y"), f"*{dtype}"), "WIDTH": width}
                types |= {"QUANTIZE": quantize, "CENTER": center}
                for option in options:
                    option = {**option, "enable_fp_fusion": False}
                    yield f"tap_linear width {width}{use} {dtype}", taps.tap_rows, types, option
                small, types["WIDTH"] = {**taps.SMALL, "enable_fp_fusion": False}, min(width, TAP_OUTPUTS_UNALIGNED)
                yield (
                    f"tap_linear width {types['WIDTH']}{use} unaligned {dtype}",
                    taps.tap_rows,
                    {**types, **odd},
                    small,
                )


def norm_gate() -> Iterator[Case]:
    sizes = dict.fromkeys(("down_stride", "side_stride", "grad_stride"), "i64:16")
    sizes |= {"rows": "i32", "width": "i32:16", "turns": "i32", "eps": "fp32"}
    odd = {**dict.fromkeys(("down_stride", "side_stride", "grad_stride"), "i64"), "width": "i32"}
    vectors = dict.fromkeys(("gate", "sums"), "*fp32")
    for decision, kernel in (("norm_gate", gate.norm_gate_rows), ("norm_gate_backward", gate.norm_gate_backward_rows)):
        for dtype in ("bf16", "fp32"):
            tensors = ("down", "side", "weight", "bias", "out", "grad", "grad_down", "grad_side")
            types = {**dict.fromkeys(tensors, f"*{dtype}"), **vectors, **sizes}
            full = {**types, "NORM": True, "BIAS": True, "VECTOR": True}
            for width in (64, 256, NORM_GATE_WIDTH):
                for choice in gate.CONFIGURATIONS[decision]:
                    yield f"{decision} width {width} {dtype}", kernel, full, gate.launch_options(choice, width)
                unaligned = gate.launch_options(gate.UNALIGNED, width)
                yield f"{decision} width {width} unaligned {dtype}", kernel, {**full, **odd}, unaligned
            plain = {**types, "NORM": False, "BIAS": False, "VECTOR": False}
            yield (
                f"{decision} no norm {dtype}",
                kernel,
                plain,
                gate.launch_options(gate.CONFIGURATIONS[decision][0], 256),
            )


def norm_index_select() -> Iterator[Case]:
    sizes = {"row_stride": "i64:16", "rows": "i32", "dim": "i32:16", "width": "i32", "eps": "fp32"}
    for dtype in ("bf16", "fp32"):
        tensors = dict.fromkeys(("hidden", "weight", "bias", "out", "grad", "grad_hidden"), f"*{dtype}")
        types = {**tensors, **sizes, "index": "*i64", "place": "*i32"}
        for layer in (False, True):
            flags = {"LAYER": layer, "BIAS": layer}
            for decision, kernel in (
                ("norm_index_select", select.norm_select_rows),
                ("norm_index_select_backward", select.norm_select_backward_rows),
            ):
                for options in select.CONFIGURATIONS[decision]:
                    name = f"{decision} {'layer' if layer else 'rms'} {dtype}"
                    yield name, kernel, {**types, **flags}, options


def linear_index_add() -> Iterator[Case]:
    strides = dict.fromkeys(("x_stride", "weight_stride", "residual_stride"), "i64:16")
    sizes = {"rows": "i32", "inputs": "i32:16", "outputs": "i32", "dim": "i32:16"}
    odd = {"x_stride": "i64", "weight_stride": "i64", "inputs": "i32"}
    for dtype, candidates in (("bf16", [*index_add.DECODE, *index_add.PREFILL]), ("fp32", index_add.FLOAT32)):
        tensors = dict.fromkeys(("x", "weight", "bias", "residual"), f"*{dtype}")
        types = {**tensors, **strides, **sizes, "index": "*i64", "BIAS": True, "UPCAST": False}
        for options in candidates:
            yield f"linear_index_add {dtype}", index_add.add_linear_tiles, types, options
        yield f"linear_index_add unaligned {dtype}", index_add.add_linear_tiles, {**types, **odd}, index_add.UNALIGNED


CASES = {
    case.__name__: case
    for case in (linear_cross_entropy, quantize_taps, tap_linear, norm_gate, norm_index_select, linear_index_add)
}
"""By the file that holds the op."""
