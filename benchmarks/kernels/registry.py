"""All ops, one line each, with what their tests and benchmarks are generated from.

A test or a benchmark asks an `Op` for inputs and runs all that it finds: the public function on every path, the naive
twin beside it. `examples` are small and awkward, `workloads` are what a layer of a real model hands the op.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module

import torch

from hf_qst_kernels import NF4Weight, decisions
from hf_qst_kernels.ops.linear_cross_entropy import linear_cross_entropy, naive_linear_cross_entropy
from hf_qst_kernels.ops.linear_index_add import linear_index_add, naive_linear_index_add
from hf_qst_kernels.ops.norm_gate import naive_norm_gate, norm_gate
from hf_qst_kernels.ops.norm_index_select import naive_norm_index_select, norm_index_select
from hf_qst_kernels.ops.quantize_taps import (
    dequantize_taps,
    naive_dequantize_taps,
    naive_quantize_taps,
    quantize_taps,
)
from hf_qst_kernels.ops.tap_linear import naive_tap_linear, tap_linear


@dataclass(frozen=True)
class ModelShape:
    """Widths of a model: of its hidden state, of the inside of its MLP, and its vocabulary."""

    name: str
    dim: int
    middle: int
    vocab: int


MODELS = (
    ModelShape("Llama-2-7B", 4096, 11008, 32000),
    ModelShape("Llama-3-8B", 4096, 14336, 128256),
    ModelShape("Llama-3-70B", 8192, 28672, 128256),
    ModelShape("Qwen3-0.6B", 1024, 3072, 151936),
    ModelShape("ViT-B", 768, 3072, 1000),
)


@dataclass(frozen=True)
class Workload:
    """One call of a real model.

    Args:
        name (`str`): what the layer is.
        arguments (`dict`): of the op's function.
        moved (`int`): bytes that have to cross the memory bus at least.
        flops (`int`): of its products.
        sizes (`dict`): of `hf_qst_kernels.decisions`; empty if the op asks no table, `None` if no kernel can run.
    """

    name: str
    arguments: dict
    moved: int
    flops: int
    sizes: dict | None


@dataclass(frozen=True)
class Op:
    """An op of this package.

    Args:
        function: the public function.
        naive: its twin, written from the equation; same arguments.
        examples: `(dtype, device) -> (name, arguments)`; what is to be differentiated requires a gradient.
        workloads: `(model, rows, dtype, device) -> Workload`.
        trains (`bool`): a workload is a forward and a backward; else a forward.
        exact_gradient: whether the gradient for these arguments is that of the op's value.
        rows: of the workloads: tokens of a decoding step, then of a prompt or a training step.
    """

    function: Callable
    naive: Callable
    examples: Callable[[torch.dtype, str], Iterator[tuple[str, dict]]]
    workloads: Callable[[ModelShape, int, torch.dtype, str], Iterator[Workload]]
    trains: bool = False
    exact_gradient: Callable[[dict], bool] = lambda arguments: True
    rows: tuple[int, ...] = (1, 4, 16, 64, 2048)

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def files(self) -> tuple[str, str]:
        """Of the package: the op's, and that of its kernels, which has `CONFIGURATIONS` if they can be tuned."""
        return f"ops/{decisions.FILES[self.name]}.py", f"ops/{decisions.FILES[self.name]}_triton.py"

    @property
    def configurations(self) -> dict[str, list[dict]]:
        """Those of each of its kernels, by the name in the table; empty for an op that asks no table."""
        module = import_module(f"hf_qst_kernels.ops.{decisions.FILES[self.name]}_triton")
        known = getattr(module, "CONFIGURATIONS", {})
        return {name: choices for name, choices in known.items() if name.startswith(self.name)}


def _normal(*shape, dtype, device, grad=False) -> torch.Tensor:
    return torch.randn(*shape, device=device).to(dtype).requires_grad_(grad)


def _selection(width: int, dim: int, device: str) -> torch.Tensor:
    return torch.randperm(dim, device=device)[:width].sort().values.int()


def _of(share: float, width: int) -> int:
    """A pruned width: a multiple of 64, as tiles and wide loads want it. Shares: arXiv 2410.11988, figure 6, at 50%."""
    return max(64, round(share * width / 64) * 64)


def _size(dtype: torch.dtype) -> int:
    return torch.empty(0, dtype=dtype).element_size()


def _nf4_arguments(inputs, outputs, nested, device) -> dict:
    packed = torch.randint(256, (inputs * outputs // 2, 1), dtype=torch.uint8, device=device)
    blocks = inputs * outputs // 64
    if not nested:
        return {"packed": packed, "absmax": torch.rand(blocks, device=device), "out_features": outputs}
    return {
        "packed": packed,
        "absmax": torch.randint(256, (blocks,), dtype=torch.uint8, device=device),
        "out_features": outputs,
        "nested_absmax": torch.rand(-(-blocks // 256), device=device),
        "nested_code": torch.linspace(-1, 1, 256, device=device),
        "nested_offset": torch.tensor(1.5, device=device),
    }


def _nf4_bytes(weights: int) -> int:
    """Of so many weights, with double quantisation."""
    return weights // 2 + weights // 64 + weights // 64 // 64


def _cross_entropy_examples(dtype, device):
    smooth = {"label_smoothing": 0.3, "logit_softcap": 2.0}
    for name, (rows, dim, vocab), option in (
        ("plain", (1, 3, 1), {}),
        ("4 bits twice", (7, 192, 65), {"logit_scale": 0.1}),
        ("sum", (7, 16, 65), {"reduction": "sum", "logit_scale": 1.7}),
        ("smoothing and softcap", (3, 7, 1023), smooth),
        ("4 bits", (5, 64, 1023), {**smooth, "reduction": "sum", "logit_scale": 0.1}),
    ):
        hidden = _normal(rows, dim, dtype=dtype, device=device, grad=True)
        labels = torch.randint(vocab, (rows,), device=device)
        labels[1:2] = -100
        if name.startswith("4 bits"):
            weight = NF4Weight(**_nf4_arguments(dim, vocab, name.endswith("twice"), device))
        else:
            weight = _normal(vocab, dim, dtype=dtype, device=device)
        bias = _normal(vocab, dtype=dtype, device=device)
        yield name, {"hidden": hidden, "weight": weight, "labels": labels, "bias": bias, "chunk_size": 4, **option}


def _cross_entropy_workloads(model, rows, dtype, device):
    hidden = _normal(rows, model.dim, dtype=dtype, device=device, grad=True)
    weight = (torch.randn(model.vocab, model.dim, device=device) / model.dim**0.5).to(dtype)
    labels = torch.randint(model.vocab, (rows,), device=device)
    moved = _size(dtype) * (2 * weight.numel() + 2 * hidden.numel())
    arguments = {"hidden": hidden, "weight": weight, "labels": labels}
    yield Workload("head", arguments, moved, 4 * rows * model.dim * model.vocab, {})
    packed = NF4Weight(**_nf4_arguments(model.dim, model.vocab, True, device))
    moved = 2 * _nf4_bytes(weight.numel()) + 2 * _size(dtype) * hidden.numel()
    hidden = (hidden.detach() / model.dim**0.5).requires_grad_()  # the weights here are of size 1
    yield Workload(
        "4-bit head", {**arguments, "hidden": hidden, "weight": packed}, moved, 4 * rows * weight.numel(), {}
    )


def _quantize_examples(dtype, device):
    for shape in ((1, 1), (7, 63), (2, 3, 65), (1, 1023), (0, 64)):
        yield f"{list(shape)}", {"x": _normal(*shape, dtype=dtype, device=device)}
    yield "strided", {"x": _normal(5, 130, dtype=dtype, device=device)[:, ::2], "block": 24}


def _quantize_workloads(model, rows, dtype, device):
    x = _normal(rows, model.dim, dtype=dtype, device=device)
    yield Workload("hidden state", {"x": x}, x.numel() * (_size(dtype) + 1) + x.numel() // 16, 0, {})


def _dequantize_examples(dtype, device):
    for shape in ((1, 1), (7, 63), (2, 3, 65), (1, 1023), (0, 64)):
        q = torch.randint(-127, 128, shape, dtype=torch.int8, device=device)
        scales = torch.rand(*shape[:-1], -(-shape[-1] // 64), device=device)
        yield f"{list(shape)}", {"q": q, "scales": scales, "dtype": dtype}


def _dequantize_workloads(model, rows, dtype, device):
    q, scales = quantize_taps(_normal(rows, model.dim, dtype=dtype, device=device))
    moved = q.numel() * (_size(dtype) + 1) + q.numel() // 16
    yield Workload("hidden state", {"q": q, "scales": scales, "dtype": dtype}, moved, 0, {})


def _tap_examples(dtype, device):
    for storage, (rows, dim, width) in (("int8", (7, 65, 3)), ("full", (3, 63, 7)), ("int8", (1, 1, 1))):
        x = _normal(rows, dim, dtype=dtype, device=device)
        weight = _normal(width, dim, dtype=dtype, device=device, grad=True)
        yield f"{storage} {rows}x{dim}", {"x": x, "weight": weight, "storage": storage}
    exact = torch.promote_types(dtype, torch.float32)
    # few channels in int8: float32 and the twin may put a tie on either side, half a step apart
    for storage, dim, trains in (("int8", 65, True), ("full", 1023, True), ("full", 130, False)):
        center = _normal(dim, dtype=exact, device=device) + 3
        x = (torch.randn(2, 6, dim, device=device) + center).to(dtype)[:, ::2]
        arguments = {"weight": _normal(5, dim, dtype=dtype, device=device, grad=trains), "center": center}
        yield f"{storage} centered{'' if trains else ', fixed'}", {"x": x, "storage": storage, **arguments}
    yield "empty, centered", {"x": torch.empty(0, 130, dtype=dtype, device=device), "storage": storage, **arguments}


def _tap_workloads(model, rows, dtype, device):
    x = _normal(rows, model.dim, dtype=dtype, device=device)
    for name, outputs, storage, center in (
        ("to dim / 16", model.dim // 16, "int8", None),
        ("rank 16", 16, "int8", None),
        ("rank 16, no copy", 16, "full", None),
        ("to dim / 16, centered, no copy", model.dim // 16, "full", torch.randn(model.dim, device=device)),
    ):
        weight = _normal(outputs, model.dim, dtype=dtype, device=device, grad=True)
        arguments = {"x": x, "weight": weight, "storage": storage}
        if center is not None:
            arguments["center"] = center
        kept = storage == "int8"
        # x in forward, with its copy written, and that or x again in backward
        moved = x.numel() * (_size(dtype) + (2 if kept else _size(dtype))) + 3 * _size(dtype) * weight.numel()
        sizes = decisions.tap_linear_sizes(x, weight, dtype, kept, center is not None)
        yield Workload(name, arguments, moved, 4 * x.numel() * outputs, sizes)


def _gate_examples(dtype, device):
    options = {"dtype": dtype, "device": device, "grad": True}
    exact = {**options, "dtype": torch.promote_types(dtype, torch.float32)}
    for shape, vector, norm in (
        ((1, 1), False, True),
        ((7, 3), True, True),
        ((2, 3, 65), False, True),
        ((3, 1023), True, True),
        ((5, 33), False, False),
        ((0, 64), True, True),
    ):
        width = shape[-1]
        arguments = {"down": (_normal(*shape, dtype=dtype, device=device) + 2).requires_grad_()}
        arguments["side"] = _normal(*shape, **options)
        gate = _normal(width if vector else 1, **exact)
        if norm:
            arguments |= {name: _normal(width, **options) for name in ("weight", "bias")}
        yield f"{list(shape)} {'vector' if vector else 'scalar'}", {**arguments, "gate": gate}
    down, side = (_normal(4, 6, 130, dtype=dtype, device=device)[:, ::2, ::2].requires_grad_() for _ in range(2))
    gate, weight = _normal(65, **exact), _normal(65, **options)
    arguments = {"down": down, "side": side, "gate": gate, "weight": weight, "eps": 1e-2, "out_dtype": dtype}
    yield "strided, no bias", arguments


def _gate_workloads(model, rows, dtype, device):
    width, options = model.dim // 16, {"dtype": dtype, "device": device, "grad": True}
    arguments = {name: _normal(rows, width, **options) for name in ("down", "side")}
    arguments |= {name: _normal(width, **options) for name in ("weight", "bias")}
    gate = torch.zeros(1, device=device, requires_grad=True)
    # two read and one written, then three read and two written
    moved, sizes = 8 * _size(dtype) * rows * width, decisions.norm_gate_sizes(arguments["side"])
    yield Workload("side block input", {**arguments, "gate": gate}, moved, 0, sizes)


def _norm_examples(dtype, device):
    for kind, shape, width in (
        ("rms", (1, 1), 1),
        ("rms", (2, 3, 63), 7),
        ("layer", (7, 65), 65),
        ("layer", (3, 1023), 257),
        ("rms", (0, 64), 3),
    ):
        dim = shape[-1]
        hidden = _normal(*shape, dtype=dtype, device=device, grad=True)
        weight, bias = (_normal(dim, dtype=dtype, device=device) for _ in range(2))
        arguments = {
            "weight": weight,
            "bias": bias if kind == "layer" else None,
            "index": _selection(width, dim, device),
        }
        yield f"{kind} {list(shape)} {width}", {"hidden": hidden, **arguments, "kind": kind, "eps": 1e-5}
    trained = {name: _normal(33, dtype=dtype, device=device, grad=True) for name in ("weight", "bias")}
    hidden = (_normal(5, 66, dtype=dtype, device=device)[:, ::2] + 3).requires_grad_()
    yield "trained, strided", {"hidden": hidden, **trained, "index": _selection(9, 33, device).long(), "kind": "layer"}


def _norm_workloads(model, rows, dtype, device):
    width = _of(0.63, model.dim)
    hidden = _normal(rows, model.dim, dtype=dtype, device=device)
    weight, index = _normal(model.dim, dtype=dtype, device=device), _selection(width, model.dim, device)
    arguments = {"hidden": hidden, "weight": weight, "bias": None, "index": index}
    moved = _size(dtype) * (rows * (model.dim + width) + model.dim) + 4 * width
    yield Workload("attention input", arguments, moved, 0, decisions.norm_index_select_sizes(hidden, index))


def _linear_add_examples(dtype, device):
    for shape, width, dim, inplace in (
        ((1, 1), 1, 1, False),
        ((7, 65), 63, 130, False),
        ((2, 3, 63), 3, 7, True),
        ((65, 33), 17, 40, False),
        ((0, 7), 3, 7, False),
    ):
        grad, options = not inplace, {"dtype": dtype, "device": device}
        yield (
            f"{list(shape)} {width} of {dim}{' in place' if inplace else ''}",
            {
                "x": _normal(*shape, **options, grad=grad),
                "weight": _normal(width, shape[-1], **options, grad=grad),
                "bias": _normal(width, **options, grad=grad) if width != 3 else None,
                "index": _selection(width, dim, device),
                "residual": _normal(*shape[:-1], dim, **options, grad=grad),
                "inplace": inplace,
            },
        )
    strided = _normal(5, 40, dtype=dtype, device=device)[:, ::2]
    weight, residual = _normal(7, 20, dtype=dtype, device=device), _normal(5, 9, dtype=dtype, device=device)
    arguments = {"weight": weight, "bias": None, "index": _selection(7, 9, device), "residual": residual}
    yield "strided", {"x": strided.requires_grad_(), **arguments}


def _linear_add_workloads(model, rows, dtype, device):
    width = _of(0.93, model.dim)
    for name, inputs in (("attention output", model.dim), ("MLP output", _of(0.45, model.middle))):
        weight = _normal(width, inputs, dtype=dtype, device=device)
        arguments = {
            "x": _normal(rows, inputs, dtype=dtype, device=device),
            "weight": weight,
            "bias": None,
            "index": _selection(width, model.dim, device),
            "residual": _normal(rows, model.dim, dtype=dtype, device=device),
            "inplace": True,
        }
        moved = _size(dtype) * (rows * inputs + weight.numel() + 2 * rows * width) + 4 * width
        sizes = decisions.linear_index_add_sizes(rows, weight)
        yield Workload(name, arguments, moved, 2 * rows * weight.numel(), sizes)


OPS = (
    Op(linear_cross_entropy, naive_linear_cross_entropy, _cross_entropy_examples, _cross_entropy_workloads, trains=True, rows=(2048, 8192)),
    Op(quantize_taps, naive_quantize_taps, _quantize_examples, _quantize_workloads, rows=(16, 2048, 8192)),
    Op(dequantize_taps, naive_dequantize_taps, _dequantize_examples, _dequantize_workloads, rows=(16, 2048, 8192)),
    Op(tap_linear, naive_tap_linear, _tap_examples, _tap_workloads, trains=True, exact_gradient=lambda a: a["storage"] == "full", rows=(2048, 8192)),
    Op(norm_gate, naive_norm_gate, _gate_examples, _gate_workloads, trains=True, rows=(2048, 8192)),
    Op(norm_index_select, naive_norm_index_select, _norm_examples, _norm_workloads),
    Op(linear_index_add, naive_linear_index_add, _linear_add_examples, _linear_add_workloads),
)  # fmt: skip
