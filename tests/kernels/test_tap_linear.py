"""`tap_linear`, `quantize_taps` and `dequantize_taps` against the equations of their files."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from hf_qst_kernels import dequantize_taps, ops, quantize_taps, tap_linear, use_backend
from hf_qst_kernels.decisions import tap_linear_sizes
from hf_qst_kernels.ops.quantize_taps import TINY

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (7, 3), (5, 64), (3, 65), (2, 4, 130), (1, 1023), (9,)]


def naive_quantize(x, block=64):
    """Block by block in float64: the scale is the largest magnitude over 127, the value the nearest multiple of it."""
    rows = x.reshape(-1, x.shape[-1]).double()
    blocks = math.ceil(rows.shape[1] / block)
    scales = torch.zeros(rows.shape[0], blocks, dtype=torch.float64)
    q = torch.zeros_like(rows)
    for row in range(rows.shape[0]):
        for index in range(blocks):
            part = slice(index * block, (index + 1) * block)
            scales[row, index] = rows[row, part].abs().max() / 127
            if scales[row, index] > 0:
                q[row, part] = (rows[row, part] / scales[row, index]).round()
    return q.view(x.shape), scales.view(*x.shape[:-1], blocks)


def spread(scales, dim, block=64):
    """Scales [..., blocks] as one number a channel [..., dim]."""
    return scales.repeat_interleave(block, -1)[..., :dim]


def saved_bytes(call):
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel() * t.element_size()) or t, lambda t: t
    ):
        result = call()
    return sum(sizes), result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantised_values_and_scales_match_the_equation(shape, dtype, poisoned):
    x = (torch.randn(shape) * 10).to(dtype)
    q, scales = quantize_taps(x)
    expected_q, expected_scales = naive_quantize(x)
    assert q.dtype == torch.int8 and scales.dtype == torch.float32
    torch.testing.assert_close(scales.double(), expected_scales, rtol=2**-23, atol=0)
    # float32 may put what lies within an ulp of a tie on its other side
    off = (q.double() - expected_q).abs()
    assert off.max() <= 1 and (off > 0).double().mean() <= 0.01


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip_is_within_half_a_step(shape, dtype, poisoned):
    x = (torch.randn(shape) * 10).to(dtype)
    q, scales = quantize_taps(x)
    restored = dequantize_taps(q, scales, dtype)
    assert restored.dtype == dtype and restored.shape == x.shape
    step = spread(scales, x.shape[-1]).double()
    # half a step; 127 rounded steps of float32's roundoff; the cast to dtype
    bound = step / 2 + 127 * step * 2**-22 + restored.double().abs() * torch.finfo(dtype).eps / 2
    assert ((restored.double() - x.double()).abs() <= bound).all()


@pytest.mark.parametrize("block", [1, 5, 64, 200])
def test_other_block_widths(block, poisoned):
    x = torch.randn(6, 130)
    q, scales = quantize_taps(x, block)
    assert scales.shape == (6, math.ceil(130 / block))
    error = (dequantize_taps(q, scales, block=block) - x).abs()
    assert (error <= spread(scales, 130, block) * (0.5 + 127 * 2**-22)).all()


def test_zero_blocks_stay_zero_and_outliers_hurt_only_their_block(poisoned):
    x = torch.randn(4, 192)
    x[:, :64] = 0
    x[1, 64] = 3e38  # its scale is beyond float16
    x[2, 128:] *= 1e-30
    q, scales = quantize_taps(x)
    restored = dequantize_taps(q, scales)
    assert torch.equal(restored[:, :64], x[:, :64])
    assert restored[1, 64] == pytest.approx(3e38, rel=1e-6)
    for row, part in ((1, slice(128, 192)), (2, slice(128, 192)), (0, slice(64, 128))):
        assert ((restored - x)[row, part].abs() <= x[row, part].abs().max() / 127 * 0.5001).all()


def test_blocks_too_small_for_a_normal_scale_become_zero(poisoned):
    x = torch.full((2, 64), TINY / 2)
    x[1] = 1e-45
    q, scales = quantize_taps(x)
    assert not q.any() and not scales.any()


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_a_block_that_is_not_finite_does_not_come_back_as_numbers(bad, poisoned):
    x = torch.randn(3, 128)
    x[1, 70] = bad
    restored = dequantize_taps(*quantize_taps(x))
    assert not restored[1, 64:].isfinite().any()
    assert restored[[0, 2]].isfinite().all() and restored[1, :64].isfinite().all()


def test_ties_round_to_even_and_runs_repeat():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5]])
    q, _ = quantize_taps(x)
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, 126]]
    x = torch.randn(700, 770)
    assert all(torch.equal(a, b) for a, b in zip(quantize_taps(x), quantize_taps(x), strict=True))


def test_strided_and_empty_inputs(poisoned):
    x = torch.randn(10, 6, 140).transpose(0, 1)[:, ::2, ::2]
    q, scales = quantize_taps(x)
    expected_q, expected_scales = quantize_taps(x.clone(memory_format=torch.contiguous_format))
    assert torch.equal(q, expected_q) and torch.equal(scales, expected_scales)
    padded = torch.cat([q, q], -1)[..., :70]
    assert torch.equal(dequantize_taps(padded, scales), dequantize_taps(q, scales))
    q, scales = quantize_taps(torch.empty(0, 70))
    assert q.shape == (0, 70) and scales.shape == (0, 2) and dequantize_taps(q, scales).shape == (0, 70)


@pytest.mark.parametrize("storage", ["int8", "full"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_is_exact(shape, storage, poisoned):
    x, weight = torch.randn(shape), torch.randn(6, shape[-1], requires_grad=True)
    y = tap_linear(x, weight, storage)
    assert y.shape == (*shape[:-1], 6)
    torch.testing.assert_close(y, F.linear(x, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_gradient_is_within_the_bound_rounding_gives(shape, dtype, poisoned):
    """dW_ij - exact = sum_t dy_ti (q s - x)_tj, and each |q s - x| <= s / 2."""
    x, weight = torch.randn(shape).to(dtype) * 3, torch.randn(6, shape[-1], requires_grad=True)
    y = tap_linear(x, weight, "int8")
    grad_y = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, weight, grad_y)
    dy, rows = grad_y.reshape(-1, 6).double(), x.reshape(-1, shape[-1]).double()
    _, scales = naive_quantize(x)
    step = spread(scales.reshape(rows.shape[0], -1), shape[-1])
    # float32's own share: of the products' sum, and of 127 steps
    bound = dy.abs().t() @ (step / 2) * (1 + 254 * 2**-22) + dy.abs().t() @ rows.abs() * len(rows) * 2**-23
    assert ((grad.double() - dy.t() @ rows).abs() <= bound).all()
    assert grad.dtype == weight.dtype


@pytest.mark.parametrize("storage", ["int8", "full"])
def test_gradient_summed_over_chunks_of_rows(storage, monkeypatch, poisoned):
    x, weight = torch.randn(50, 130).bfloat16(), torch.randn(6, 130, requires_grad=True)
    grad_y = torch.randn(50, 6)
    (whole,) = torch.autograd.grad(tap_linear(x, weight, storage), weight, grad_y)
    monkeypatch.setattr("hf_qst_kernels.ops.quantize_taps.CHUNK_BYTES", {"cpu": 4 * 130 * 7, "cuda": 0})
    (chunked,) = torch.autograd.grad(tap_linear(x, weight, storage), weight, grad_y)
    torch.testing.assert_close(chunked, whole)


@pytest.mark.parametrize("center", [False, True])
def test_full_gradient_is_exact_and_passes_gradcheck(center):
    x = torch.randn(3, 4, 70, dtype=torch.float64)
    weight = torch.randn(5, 70, dtype=torch.float64, requires_grad=True)
    c = torch.randn(70, dtype=torch.float64) if center else None
    assert torch.autograd.gradcheck(lambda w: tap_linear(x, w, "full", c), weight)


def test_an_eager_call_passes_its_operator_by(monkeypatch):
    monkeypatch.setattr(ops.tap_linear._tap_linear, "library", None)
    x, weight = torch.randn(3, 70), torch.randn(4, 70, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(tap_linear(x, weight), F.linear(x, weight))
    (grad,) = torch.autograd.grad(tap_linear(x, weight, "full").sum(), weight)
    torch.testing.assert_close(grad, x.sum(0).expand(4, -1))
    with pytest.raises(TypeError, match="not callable"):  # a tensor that somebody traces needs the operator
        tap_linear(x.to("meta"), weight.to("meta"))


def test_sizes_in_the_table():
    """A product in x's own dtype with an int8 copy says nothing of one without, of a centred one or of float32's."""
    x, weight = torch.randn(2, 3, 32).bfloat16(), torch.randn(5, 32)
    plain = {"rows": 6, "dim": 32, "outputs": 5, "alignment": 16}
    cases = {
        (torch.bfloat16, False, False): plain,
        (torch.bfloat16, True, False): {**plain, "quantized": 1},
        (torch.bfloat16, False, True): {**plain, "centered": 1},
        (torch.float32, False, False): {**plain, "product_bits": 32},
    }
    for (dtype, quantized, centered), expected in cases.items():
        assert tap_linear_sizes(x, weight.to(dtype), dtype, quantized, centered) == expected
    apart = torch.randn(6, 33).bfloat16()[:, :32]
    assert tap_linear_sizes(apart, weight.bfloat16(), torch.bfloat16, False, False) == {**plain, "alignment": 1}
    for bad in (weight.new_zeros(257, 32), weight.new_zeros(0, 32)):
        assert tap_linear_sizes(x, bad.bfloat16(), torch.bfloat16, True, False) is None
    assert tap_linear_sizes(x[..., ::2], weight.new_zeros(129, 16).bfloat16(), torch.bfloat16, True, False)
    assert tap_linear_sizes(x[..., :7], weight.new_zeros(129, 7).bfloat16(), torch.bfloat16, True, False) is None


@pytest.mark.parametrize("storage", ["int8", "full"])
def test_a_center_is_subtracted_from_what_is_multiplied(storage, poisoned):
    x, center = torch.randn(4, 5, 130) + 3, torch.randn(130) + 3
    weight, grad_y = torch.randn(6, 130, requires_grad=True), torch.randn(4, 5, 6)
    y = tap_linear(x, weight, storage, center)
    assert torch.equal(y, F.linear(x - center, weight))
    (grad,) = torch.autograd.grad(y, weight, grad_y)
    dy, rows = grad_y.view(-1, 6).double(), (x - center).view(-1, 130).double()
    _, scales = naive_quantize(x)
    step = spread(scales.view(20, -1), 130) if storage == "int8" else torch.zeros(20, 130).double()
    bound = dy.abs().t() @ (step / 2) * (1 + 254 * 2**-22) + dy.abs().t() @ (rows.abs() + 6) * 20 * 2**-23
    assert ((grad.double() - dy.t() @ rows).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_center_is_subtracted_before_anything_is_rounded(dtype):
    """As outlier channels need it: x of 300 and a center near it have hardly a digit in common with their difference."""
    x = (300 + torch.randn(40, 70)).to(dtype)
    center, weight = x.float().mean(0), torch.randn(6, 70).to(dtype)
    expected = (x.double() - center.double()) @ weight.double().t()
    error = (tap_linear(x, weight, center=center).double() - expected).abs().max() / expected.abs().max()
    assert error <= 2 * torch.finfo(dtype).eps
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = tap_linear(x, weight, center=center)
        assert torch.equal(y, F.linear((x.float() - center).bfloat16(), weight))


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_copy_of_all_rows_is_made(x_dtype, center, monkeypatch):
    x, weight = torch.randn(4, 50, 130).to(x_dtype), torch.randn(6, 130)
    c = torch.randn(130) if center else None
    whole = tap_linear(x, weight, center=c)
    monkeypatch.setattr("hf_qst_kernels.ops.quantize_taps.CHUNK_BYTES", {"cpu": 4 * 130 * 7, "cuda": 0})
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        chunked = tap_linear(x, weight, center=c)
    torch.testing.assert_close(chunked, whole)
    largest = max((event.self_cpu_memory_usage for event in recorded.events()), default=0)
    # of 200 rows a chunk of 7, and the result
    assert largest <= max(4 * 130 * 7, 4 * 200 * 6) < x.nbytes


@pytest.mark.parametrize("storage", ["int8", "full"])
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
def test_mixed_dtypes_compute_in_the_weights(x_dtype, weight_dtype, storage):
    x, weight = torch.randn(20, 70).to(x_dtype), torch.randn(5, 70).to(weight_dtype).requires_grad_()
    y = tap_linear(x, weight, storage)
    torch.testing.assert_close(y, F.linear(x.to(weight_dtype), weight))
    (grad,) = torch.autograd.grad(y.float().sum(), weight)
    assert y.dtype == grad.dtype == weight_dtype
    # a column sum of 20 entries: half a step of at most 4 / 127 each, and the rounding of the result
    bound = (0.35 if storage == "int8" else 1e-4) + 20 * torch.finfo(weight_dtype).eps
    assert (grad.float() - x.float().sum(0)).abs().max() <= bound


@pytest.mark.parametrize("storage", ["int8", "full"])
def test_autocast_decides_the_gemms_dtype(storage):
    x, weight = torch.randn(20, 70), torch.randn(5, 70, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = tap_linear(x, weight, storage)
        assert torch.equal(y, F.linear(x, weight))
    (grad,) = torch.autograd.grad(y, weight, torch.ones_like(y))
    assert y.dtype == torch.bfloat16 and grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_kept_for_backward(dtype):
    x, weight = torch.randn(30, 768).to(dtype), torch.randn(8, 768, requires_grad=True)
    int8, _ = saved_bytes(lambda: tap_linear(x, weight))
    full, _ = saved_bytes(lambda: tap_linear(x, weight, "full"))
    assert int8 == 30 * (768 + 4 * 12)
    assert full == 30 * 768 * x.element_size()
    with torch.no_grad():
        assert saved_bytes(lambda: tap_linear(x, weight))[0] == 0
    assert saved_bytes(lambda: tap_linear(x, weight.detach()))[0] == 0


@pytest.mark.parametrize("storage", ["int8", "full"])
def test_opcheck(storage):
    x, weight = torch.randn(3, 5, 70), torch.randn(4, 70, requires_grad=True)
    torch.library.opcheck(torch.ops.hf_qst.tap_linear.default, (x, weight, None, torch.float32, storage, True))
    torch.library.opcheck(
        torch.ops.hf_qst.tap_linear.default, (x, weight.detach(), torch.randn(70), torch.bfloat16, storage, False)
    )
    torch.library.opcheck(torch.ops.hf_qst.quantize_taps.default, (x, 64))
    q, scales = quantize_taps(x)
    torch.library.opcheck(torch.ops.hf_qst.dequantize_taps.default, (q, scales, torch.float16, 64))
    grad_y = torch.randn(3, 5, 4)
    kept = (q, scales, None) if storage == "int8" else (x, None, torch.randn(70))
    torch.library.opcheck(torch.ops.hf_qst.tap_linear_grad_weight.default, (grad_y, *kept, torch.bfloat16))


@pytest.mark.parametrize("dynamic", [None, True], ids=["", "dynamic"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("storage", ["int8", "full"])
def test_compiles_into_one_graph(storage, backend, dynamic):
    x, weight = torch.randn(3, 5, 70), torch.randn(4, 70, requires_grad=True)

    def step(weight):
        return tap_linear(x * 2, weight, storage).square().mean()

    loss = torch.compile(step, fullgraph=True, backend=backend, dynamic=dynamic)(weight)
    torch.testing.assert_close(loss, step(weight))
    torch.testing.assert_close(torch.autograd.grad(loss, weight), torch.autograd.grad(step(weight), weight))


def test_meta_tensors_give_meta_tensors():
    x, weight = torch.randn(3, 70, device="meta"), torch.randn(4, 70, device="meta", requires_grad=True)
    y = tap_linear(x, weight)
    y.sum().backward()
    assert y.shape == (3, 4) and weight.grad.shape == (4, 70)


def test_public_quantiser_compiles_and_exports():
    def round_trip(x):
        return dequantize_taps(*quantize_taps(x))

    class RoundTrip(torch.nn.Module):
        def forward(self, x):
            return round_trip(x)

    x = torch.randn(3, 70)
    assert torch.equal(torch.compile(round_trip, fullgraph=True, backend="aot_eager")(x), round_trip(x))
    assert torch.equal(torch.export.export(RoundTrip(), (x,)).module()(x), round_trip(x))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: tap_linear(torch.randn(3, 4, requires_grad=True), torch.randn(2, 4)),
            ValueError,
            "x requires a gradient",
        ),
        (lambda: tap_linear(torch.randn(3, 4), torch.randn(2, 5)), ValueError, r"weight must be .*got \[2, 5\]"),
        (
            lambda: tap_linear(torch.randn(3, 4), torch.randn(2, 4), center=torch.randn(1)),
            ValueError,
            r"center must be \[dim\] = \[4\], got \[1\]",
        ),
        (
            lambda: tap_linear(torch.randn(3, 4), torch.randn(2, 4), center=torch.ones(4, requires_grad=True)),
            ValueError,
            "center requires a gradient",
        ),
        (
            lambda: tap_linear(torch.randn(3, 4), torch.randn(2, 4), center=torch.ones(4).int()),
            TypeError,
            "center must have a dtype",
        ),
        (
            lambda: tap_linear(torch.randn(3, 4), torch.randn(2, 4), "int4"),
            ValueError,
            "storage must be one of .*'int4'",
        ),
        (lambda: tap_linear(torch.ones(3, 4, dtype=torch.int32), torch.randn(2, 4)), TypeError, "x must have a dtype"),
        (lambda: quantize_taps(torch.ones(3, 4, dtype=torch.int64)), TypeError, "x must have a dtype"),
        (lambda: quantize_taps(torch.ones(3, 4), 0), ValueError, "block must be an integer >= 1, got 0"),
        (lambda: quantize_taps(torch.ones(())), ValueError, r"x must be \[..., dim\]"),
        (
            lambda: dequantize_taps(torch.ones(3, 65, dtype=torch.int8), torch.ones(3, 1)),
            ValueError,
            r"scales must be .*got \[3, 1\] and \[3, 65\]",
        ),
        (lambda: dequantize_taps(torch.ones(3, 4), torch.ones(3, 1)), TypeError, "q, scales and dtype must be int8"),
    ],
)
def test_refuses_with_the_argument_and_its_value(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (300, 4096)], ids=str)
def test_on_cuda_as_on_cpu(backend, dtype, shape):
    x = (torch.randn(shape) * 10).to(dtype)
    weight = torch.randn(6, shape[-1], requires_grad=True)
    grad_y = torch.randn(*shape[:-1], 6)
    (expected,) = torch.autograd.grad(tap_linear(x, weight), weight, grad_y)
    cuda_weight = weight.detach().cuda().requires_grad_()
    with use_backend(backend):
        q, scales = quantize_taps(x.cuda())
        restored = dequantize_taps(q, scales, dtype)
        (grad,) = torch.autograd.grad(tap_linear(x.cuda(), cuda_weight), cuda_weight, grad_y.cuda())
    expected_q, expected_scales = quantize_taps(x)
    # an ulp in the scale (CUDA divides by a number through its reciprocal) may move a value over a tie
    torch.testing.assert_close(scales.cpu(), expected_scales, rtol=2**-22, atol=0)
    assert (q.cpu().int() - expected_q.int()).abs().max() <= 1
    step = spread(expected_scales, shape[-1])
    assert ((restored.cpu().float() - x.float()).abs() <= step * 0.501 + x.float().abs() * torch.finfo(dtype).eps).all()
    moved = grad_y.reshape(-1, 6).abs().t() @ step.reshape(-1, shape[-1])
    assert ((grad.cpu() - expected).abs() <= 1e-2 * moved + 1e-4 * expected.abs().max()).all()
