"""What holds for every op of the registry: values and gradients of its naive twin, on every path and for every input."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

import hf_qst_kernels
from benchmarks.kernels import registry
from benchmarks.kernels.registry import MODELS, OPS
from hf_qst_kernels import dispatch, operators, use_backend
from tests.kernels.compared import TOLERANCE, fresh, results, worst_distance

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EACH = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
FOLDER = Path(hf_qst_kernels.__file__).parent


def examples(op, dtype, device="cpu"):
    torch.manual_seed(0)
    return list(op.examples(dtype, device))


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@EACH
def test_library_path_equals_the_naive_twin(op, dtype, poisoned):
    for name, arguments in examples(op, dtype):
        twin = results(op.naive, arguments, torch.float64)
        # scales of int8 are float32 by contract
        tolerance = max(TOLERANCE[dtype], 1e-6 if "tap" in op.name else 0)
        assert worst_distance(results(op.function, arguments), twin) <= tolerance, name


@EACH
def test_naive_backend_is_the_naive_twin(op):
    for name, arguments in examples(op, torch.float64):
        with use_backend("naive"):
            ours = results(op.function, arguments)
        assert all(map(torch.equal, ours, results(op.naive, arguments))), name


@EACH
def test_gradcheck(op):
    for name, arguments in examples(op, torch.float64):
        leaves = [key for key, v in arguments.items() if isinstance(v, torch.Tensor) and v.requires_grad]
        if not leaves or not op.exact_gradient(arguments) or sum(arguments[key].numel() for key in leaves) > 1500:
            continue

        def call(*tensors, keys=leaves, arguments=arguments):
            return op.function(**{**arguments, **dict(zip(keys, tensors, strict=True))})

        copies = fresh(arguments)
        assert torch.autograd.gradcheck(call, [copies[key] for key in leaves], fast_mode=True), name


class CallsOfOurs(TorchFunctionMode):
    """Collects the calls of operators that this package registered."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if isinstance(func, torch._ops.OpOverload) and func.namespace == "hf_qst":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@EACH
def test_opcheck(op, monkeypatch):
    seen = set()
    # an eager call passes the operator by
    monkeypatch.setattr(operators, "_is_eager", lambda args: False)
    for _, arguments in examples(op, torch.float32):
        with CallsOfOurs() as recorded:
            op.function(**fresh(arguments))
        for overload, args, kwargs in recorded.calls:
            seen.add(str(overload))
            torch.library.opcheck(overload, args, kwargs)
    assert any(name.startswith(f"hf_qst.{op.name}") for name in seen)


@EACH
def test_compiles_into_one_graph(op):
    for _, arguments in examples(op, torch.float32)[1:3]:
        torch._dynamo.reset()
        compiled = torch.compile(op.function, fullgraph=True, backend="aot_eager")
        assert worst_distance(results(compiled, arguments), results(op.function, arguments)) <= 1e-6


@EACH
def test_meta_tensors_give_meta_tensors(op):
    _, arguments = examples(op, torch.float32)[1]
    real = op.function(**fresh(arguments))
    moved = {k: v.detach().to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    if op.name == "linear_cross_entropy":
        pytest.skip("its labels are checked on the host; tests of its own cover meta tensors")
    meta = op.function(**moved)
    pairs = zip(*(out if isinstance(out, tuple) else (out,) for out in (real, meta)), strict=True)
    assert all(b.is_meta and a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)


@EACH
def test_workloads_are_valid_calls(op):
    tiny = dataclasses.replace(MODELS[0], dim=64, middle=128, vocab=32)
    for workload in op.workloads(tiny, 2, torch.float32, "cpu"):
        assert workload.moved > 0 and workload.flops >= 0
        twin = results(op.naive, workload.arguments, torch.float64)
        assert worst_distance(results(op.function, workload.arguments), twin) <= TOLERANCE[torch.float32]


def test_every_public_op_is_registered_and_takes_four_files():
    """Its own file, that of its kernels, the decisions and the registry; and a section of the docs."""
    assert {op.name for op in OPS} == {*hf_qst_kernels.__all__} - {"NF4Weight", "use_backend"}
    docs = (FOLDER.parents[1] / "docs" / "kernels.md").read_text()
    for op in OPS:
        paths = [*FOLDER.rglob("*.py"), Path(registry.__file__)]
        files = {path.name for path in paths if re.search(rf"\b{op.name}\b", path.read_text())}
        # the table's own docstring shows an example, and a tap quantises
        others = {"break_even.py"} | (
            {"tap_linear.py", "tap_linear_triton.py"} if op.name == "quantize_taps" else set()
        )
        assert len(files - others) <= 4, files
        assert re.search(rf"^## .*`{op.name}`", docs, re.MULTILINE), f"docs/kernels.md has no section on {op.name}"


def test_channels_outside_the_index_keep_their_bits():
    residual = torch.tensor([[float("nan"), 1e-45, 3.0, float("-inf")]] * 2)
    before = residual.clone()
    out = hf_qst_kernels.linear_index_add(
        torch.ones(2, 3), torch.ones(1, 3), None, torch.tensor([2]), residual, inplace=True
    )
    assert out is residual and out[:, 2].tolist() == [6.0, 6.0]
    others = [0, 1, 3]
    assert torch.equal(out[:, others].view(torch.int32), before[:, others].view(torch.int32))


def test_in_place_through_a_view_that_has_no_rows():
    whole = torch.randn(4, 3, 10)
    view, before = whole.transpose(0, 1)[..., ::2], whole.clone()
    x, weight, index = torch.randn(3, 4, 7), torch.randn(2, 7), torch.tensor([0, 4])
    hf_qst_kernels.linear_index_add(x, weight, None, index, view, inplace=True)
    expected = before.clone()
    expected.transpose(0, 1)[..., ::2].index_add_(-1, index, x @ weight.T)
    torch.testing.assert_close(whole, expected)


def test_in_place_op_is_functionalised_by_compile():
    def step(x, weight, index, residual):
        residual = residual * 1
        hf_qst_kernels.linear_index_add(x, weight, None, index, residual, inplace=True)
        return residual + 1

    arguments = torch.randn(5, 3), torch.randn(2, 3), torch.tensor([1, 4]), torch.randn(5, 6)
    with torch.no_grad():
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments)
        torch.testing.assert_close(compiled, step(*arguments))


def test_autocast_decides_the_gemms_dtype():
    (op,) = [op for op in OPS if op.name == "linear_index_add"]
    _, arguments = examples(op, torch.float32)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = results(op.function, arguments)
    twin = results(op.naive, arguments, torch.float64)
    assert ours[0].dtype == torch.float32  # the residual's
    # products of operands rounded once, a result rounded once, and both again in backward
    assert worst_distance(ours, twin) <= 4 * 2**-7


CALLS = {
    "norm_index_select": {
        "hidden": torch.ones(2, 4),
        "weight": torch.ones(4),
        "bias": None,
        "index": torch.tensor([1]),
    },
    "linear_index_add": {
        "x": torch.ones(2, 3),
        "weight": torch.ones(2, 3),
        "bias": None,
        "index": torch.tensor([0, 3]),
        "residual": torch.ones(2, 4),
    },
}


@pytest.mark.parametrize(
    ("name", "changed", "error", "message"),
    [
        ("norm_index_select", {"weight": torch.ones(3)}, ValueError, r"weight must be \[dim\] = \[4\], got \[3\]"),
        ("norm_index_select", {"index": torch.ones(1)}, TypeError, "index must be int32 or int64, got torch.float32"),
        ("norm_index_select", {"index": torch.zeros(1, 1, dtype=torch.int32)}, ValueError, r"index must be \[width\]"),
        ("norm_index_select", {"kind": "batch"}, ValueError, "kind must be one of .*got 'batch'"),
        ("norm_index_select", {"bias": torch.ones(4)}, ValueError, "bias must be None with kind='rms'"),
        ("norm_index_select", {"eps": -1.0}, ValueError, r"eps must be >= 0, got -1.0"),
        ("linear_index_add", {"weight": torch.ones(2, 4)}, ValueError, r"weight must be .*got \[2, 4\]"),
        ("linear_index_add", {"index": torch.tensor([1])}, ValueError, r"index must be \[width\] = \[2\], got \[1\]"),
        ("linear_index_add", {"residual": torch.ones(3, 4)}, ValueError, r"residual must be .*got \[3, 4\]"),
        ("linear_index_add", {"weight": torch.ones(2, 3).half()}, TypeError, "x, weight must have one dtype"),
        (
            "linear_index_add",
            {"x": torch.ones(2, 3, requires_grad=True), "inplace": True},
            ValueError,
            "inplace=True must be called under torch.no_grad",
        ),
    ],
)
def test_refuses_with_the_argument_and_its_value(name, changed, error, message):
    with pytest.raises(error, match=message):
        getattr(hf_qst_kernels, name)(**{**CALLS[name], **changed})


def test_environment_variable_forces_a_backend(monkeypatch):
    code = "import hf_qst_kernels.dispatch as d; assert d.runs_naive()"
    environment = {**os.environ, "HF_QST_KERNELS": "naive", "PYTHONPATH": str(FOLDER.parent)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    monkeypatch.setenv("HF_QST_KERNELS", "fast")
    with pytest.raises(ValueError, match=r"HF_QST_KERNELS must be one of .*got 'fast'"):
        dispatch._from_environment()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EACH
def test_on_cuda_as_the_naive_twin(op, dtype, backend, poisoned):
    for name, arguments in examples(op, dtype, "cuda"):
        twin = results(op.naive, arguments, torch.float64)
        with use_backend(backend):
            ours, again = results(op.function, arguments), results(op.function, arguments)
        assert worst_distance(ours, twin) <= TOLERANCE[dtype], name
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(ours, again, strict=True)), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@EACH
def test_compiles_into_one_graph_on_cuda(op):
    for _, arguments in examples(op, torch.bfloat16, "cuda")[1:3]:
        torch._dynamo.reset()
        compiled = torch.compile(op.function, fullgraph=True)
        with use_backend("triton"):
            ours, eager = results(compiled, arguments), results(op.function, arguments)
        assert worst_distance(ours, eager) <= TOLERANCE[torch.bfloat16]
