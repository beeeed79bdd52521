"""`norm_gate` beyond what the registry's tests hold of every op, and the side of the taps' kernels that no example reaches."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from hf_qst_kernels import norm_gate, ops, use_backend
from hf_qst_kernels.decisions import norm_gate_sizes
from tests.interpreter import interpreted

WIDTH = 65


def arguments(rows=(2, 5), dtype=torch.float32, vector=True, norm=True):
    torch.manual_seed(1)
    given = {name: torch.randn(*rows, WIDTH).to(dtype).requires_grad_() for name in ("down", "side")}
    given["gate"] = torch.randn(WIDTH if vector else 1, requires_grad=True)
    if norm:
        given |= {name: torch.randn(WIDTH).to(dtype).requires_grad_() for name in ("weight", "bias")}
    return given


def plain(down, side, gate, weight=None, bias=None, eps=1e-5, out_dtype=torch.float32):
    """The lines of `hf_qst.qst` that the op stands for."""
    z = down if weight is None else F.layer_norm(down.to(weight.dtype), (WIDTH,), weight, bias, eps)
    return torch.lerp(z.float(), side.float(), torch.sigmoid(gate).expand(WIDTH)).to(out_dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])
def test_library_path_is_the_plain_lines_bit_by_bit(vector, norm, dtype):
    given = arguments(dtype=dtype, vector=vector, norm=norm)
    with torch.no_grad():
        assert torch.equal(norm_gate(**given, out_dtype=torch.float32), plain(**given))
    # and through the operator, which a gradient takes
    ours = norm_gate(**given, out_dtype=torch.float32)
    assert ours.requires_grad and torch.equal(ours, plain(**given))


@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])
def test_gradients_are_those_of_the_plain_lines(vector, norm, poisoned):
    given = arguments(vector=vector, norm=norm)
    upstream = torch.randn(2, 5, WIDTH)
    leaves = list(given.values())
    ours = torch.autograd.grad(norm_gate(**given), leaves, upstream)
    torch.testing.assert_close(ours, torch.autograd.grad(plain(**given), leaves, upstream), rtol=1e-5, atol=1e-5)


def test_only_what_is_asked_for_gets_a_gradient():
    given = arguments()
    given["down"], given["weight"] = given["down"].detach(), given["weight"].detach()
    y = norm_gate(**given)
    y.sum().backward()
    assert given["down"].grad is None and given["weight"].grad is None
    assert all(given[name].grad.any() for name in ("side", "gate", "bias"))


def test_dtypes_of_results_and_gradients():
    given = arguments(dtype=torch.bfloat16)
    assert norm_gate(**given).dtype == torch.bfloat16
    assert norm_gate(**{**given, "side": given["side"].float()}).dtype == torch.float32
    y = norm_gate(**given, out_dtype=torch.float16)
    grads = torch.autograd.grad(y.float().sum(), list(given.values()))
    assert y.dtype == torch.float16 and [g.dtype for g in grads] == [t.dtype for t in given.values()]


def test_autocast_does_not_change_it():
    given = arguments()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = norm_gate(**given)
    assert y.dtype == torch.float32 and torch.equal(y, norm_gate(**given))


def test_keeps_its_arguments_and_nothing_else():
    given = arguments(dtype=torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm_gate(**given)
    assert sorted(t.data_ptr() for t in kept) == sorted(t.data_ptr() for t in given.values())
    plainly = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: plainly.append(t) or t, lambda t: t):
        plain(**given)
    assert sum(t.nbytes for t in kept) < sum(t.nbytes for t in plainly)


def test_an_eager_call_passes_its_operator_by(monkeypatch):
    monkeypatch.setattr(ops.norm_gate._norm_gate, "library", None)
    given = arguments()
    with torch.no_grad():
        assert torch.equal(norm_gate(**given), plain(**given))
    norm_gate(**given).sum().backward()
    with pytest.raises(TypeError, match="not callable"):  # a tensor that somebody traces needs the operator
        norm_gate(**{name: t.to("meta") for name, t in given.items()})


def test_sizes_in_the_table():
    assert norm_gate_sizes(torch.empty(3, 4, 48)) == {"rows": 12, "width": 48, "alignment": 16}
    assert norm_gate_sizes(torch.empty(5, 33)) == {"rows": 5, "width": 33, "alignment": 1}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"side": torch.ones(2, 3)}, ValueError, r"side must be down's shape = \[2, 4\], got \[2, 3\]"),
        ({"gate": torch.ones(2)}, ValueError, r"gate must be \[1\] or \[width\] = \[4\], got \[2\]"),
        ({"gate": torch.ones(1, 4)}, ValueError, r"gate must be .*got \[1, 4\]"),
        ({"weight": torch.ones(3)}, ValueError, r"weight must be \[width\] = \[4\], got \[3\]"),
        ({"weight": None}, ValueError, "bias must be None where weight is None"),
        ({"bias": torch.ones(1)}, ValueError, r"bias must be \[width\] = \[4\], got \[1\]"),
        ({"eps": -1e-5}, ValueError, "eps must be >= 0, got -1e-05"),
        ({"out_dtype": torch.int8}, TypeError, "out_dtype must be one of .*got torch.int8"),
        ({"down": torch.ones(2, 4).int()}, TypeError, "down must have a dtype of .*got torch.int32"),
        ({"down": torch.ones(2, 0)}, ValueError, r"down must be \[..., width\] with width >= 1, got \[2, 0\]"),
    ],
)
def test_refuses_with_the_argument_and_its_value(changed, error, message):
    good = {"down": torch.ones(2, 4), "side": torch.ones(2, 4), "gate": torch.zeros(1)}
    good |= {"weight": torch.ones(4), "bias": torch.ones(4)}
    norm_gate(**good)
    with pytest.raises(error, match=message):
        norm_gate(**{**good, **changed})


def test_triton_is_refused_without_the_interpreter(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"norm_gate: .*needs CUDA tensors, got device cpu"):
        norm_gate(**arguments())


@pytest.fixture(scope="module")
def limits():
    return interpreted("tests/kernels/norm_gate_interpreted.py")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize(
    ("case", "count"),
    [
        ("programs_with_several_tiles", 3),
        ("mixed_dtypes", 27),
        ("extremes", 4),
        ("chosen_paths", 2),
        ("taps_in_one_pass", 5),
    ],
)
def test_kernels_in_the_interpreter(limits, case, count):
    found = {name: limit for name, limit in limits.items() if name.startswith(f"{case} | ")}
    assert len(found) == count
    assert {name: (error, most) for name, (error, most) in found.items() if not error <= most} == {}
