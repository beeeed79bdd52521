"""`linear_cross_entropy` against the equation in its docstring, in float64, and against what torch and transformers do."""

import pytest
import torch
import torch.nn.functional as F
from transformers.trainer_pt_utils import LabelSmoother

from hf_qst_kernels import linear_cross_entropy, use_backend
from hf_qst_kernels.ops.linear_cross_entropy import default_chunk_rows
from tests.kernels.compared import allocations

OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "smoothing": {"label_smoothing": 0.1},
    "all smoothed": {"label_smoothing": 1.0},
    "softcap": {"logit_softcap": 2.0},
    "scale": {"logit_scale": 0.37},
    "everything": {"label_smoothing": 0.3, "logit_softcap": 3.0, "logit_scale": 1.7, "reduction": "sum"},
}
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
# unit roundoff is half of eps; the other half is slack for the order of sums
EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float16, torch.bfloat16)}


def problem(tokens, vocab, dim=16, ignored=0, bias=False, dtype=torch.float32):
    hidden = torch.randn(tokens, dim).to(dtype).requires_grad_()
    weight = torch.randn(vocab, dim).to(dtype)
    labels = torch.randint(vocab, (tokens,))
    labels[torch.randperm(tokens)[:ignored]] = -100
    return hidden, weight, labels, torch.randn(vocab).to(dtype) if bias else None


def naive(
    hidden, weight, labels, bias=None, label_smoothing=0.0, logit_softcap=None, logit_scale=1.0, reduction="mean"
):
    """Loss and its gradient in `hidden`, row by row in float64, each line one equation."""
    cap = logit_softcap
    weight, grad, losses = weight.double(), torch.zeros(hidden.shape, dtype=torch.float64), []
    for row, label in enumerate(labels.tolist()):
        if label == -100:
            continue
        z = logit_scale * (weight @ hidden[row].double() + (0 if bias is None else bias.double()))
        logits = z if cap is None else cap * torch.tanh(z / cap)
        log_p = logits - torch.logsumexp(logits, 0)
        target = torch.full_like(log_p, label_smoothing / len(log_p))
        target[label] += 1 - label_smoothing
        losses.append(-(target * log_p).sum())
        slope = 1 if cap is None else 1 - torch.tanh(z / cap) ** 2
        grad[row] = logit_scale * ((log_p.exp() - target) * slope) @ weight
    total = torch.stack(losses).sum() if losses else torch.zeros((), dtype=torch.float64)
    if reduction == "sum":
        return total, grad
    return total / len(losses) if losses else total * float("nan"), grad / max(len(losses), 1)


def rounding_bounds(hidden, weight, labels, bias, logit_scale=1.0, reduction="mean", **_):
    """How far rounding may take the loss and the gradient [tokens, dim] from the exact ones.

    A logit is off by `d`: the dtype's rounding of the result and float32's of a sum of `dim` terms. The loss of a row is
    then off by at most 2 d, each probability by a factor within exp(2 d), and `p - target` is rounded once more on its
    way into the second GEMM, whose result is rounded again.
    """
    eps, dim = EPS[weight.dtype], hidden.shape[1]
    hidden, weight = hidden.detach().double(), weight.double()
    magnitude = hidden.abs() @ weight.abs().t() + (0 if bias is None else bias.double().abs())
    d = abs(logit_scale) * magnitude.amax().item() * (eps + dim * EPS[torch.float32])
    d += 1e-6  # tanh, exp and log in float32, at arguments of a few units
    valid = (labels != -100).double()
    count = valid.sum().clamp(min=1).item() if reduction == "mean" else 1
    rows = labels.numel() if reduction == "sum" else 1
    probability = torch.ones_like(magnitude)  # p and target are at most 1
    if weight.shape[0] > 8:
        z = logit_scale * (hidden @ weight.t() + (0 if bias is None else bias.double()))
        probability = torch.softmax(z, 1) + F.one_hot(labels.clamp(min=0), weight.shape[0])
        probability += torch.softmax(torch.zeros_like(z), 1)
    slack = 8 * d + 4 * eps + weight.shape[0] * EPS[torch.float32]
    grad = abs(logit_scale) * slack * (probability @ weight.abs()) / count * valid[:, None]
    # float16's smallest steps: entries of `p - target` under them are lost, and so are such gradients
    if eps == EPS[torch.float16]:
        grad += 6e-8 * (1 + weight.abs().sum(0)) / count
    return rows * (2 * d + 1e-5), grad + 1e-6 / count


def assert_matches_naive(hidden, weight, labels, bias, chunk_size=None, grad_output=1.0, **options):
    loss = linear_cross_entropy(hidden, weight, labels, bias, chunk_size=chunk_size, **options)
    (grad,) = torch.autograd.grad(loss * grad_output, hidden)
    expected_loss, expected_grad = naive(hidden.detach(), weight, labels, bias, **options)
    loss_bound, grad_bound = rounding_bounds(hidden, weight, labels, bias, **options)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert grad.dtype == hidden.dtype
    assert abs(loss.item() - expected_loss.item()) <= loss_bound
    excess = (grad.double() - grad_output * expected_grad).abs() - abs(grad_output) * grad_bound
    assert excess.max() <= 0, f"gradient off by {excess.max():.2e} more than rounding explains"


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_loss_and_gradient_match_the_equation(options, bias, poisoned):
    assert_matches_naive(*problem(23, 101, ignored=5, bias=bias), chunk_size=7, **options)


@pytest.mark.parametrize("vocab", [1, 3, 1000, 4097])
@pytest.mark.parametrize("tokens", [1, 7, 1023])
def test_odd_shapes(tokens, vocab, poisoned):
    if tokens * vocab > 2**21:
        tokens = 131  # 1023 rows of 4097 take the row-by-row reference seconds and try nothing new
    assert_matches_naive(*problem(tokens, vocab, ignored=tokens // 3), label_smoothing=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["everything"]], ids=["plain", "everything"])
def test_dtypes(dtype, options, poisoned):
    assert_matches_naive(*problem(37, 1000, ignored=4, bias=True, dtype=dtype), chunk_size=10, **options)


@pytest.mark.parametrize("chunk_size", [1, 22, 23, 24, None])
def test_any_chunk_size_gives_the_same(chunk_size, poisoned):
    assert_matches_naive(*problem(23, 50, ignored=0), chunk_size=chunk_size)


@pytest.mark.parametrize("grad_output", [0.0, -3.5, 65536.0])
def test_incoming_gradient_other_than_one(grad_output):
    assert_matches_naive(*problem(9, 50, bias=True), grad_output=grad_output)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_equals_torch_cross_entropy(options):
    hidden, weight, labels, bias = problem(23, 101, ignored=5, bias=True)
    kwargs = dict(options)
    cap, scale = kwargs.pop("logit_softcap", None), kwargs.pop("logit_scale", 1.0)
    logits = scale * F.linear(hidden, weight, bias)
    expected = F.cross_entropy(logits if cap is None else cap * torch.tanh(logits / cap), labels, **kwargs)
    loss = linear_cross_entropy(hidden, weight, labels, bias, **options)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden), torch.autograd.grad(expected, hidden))


def test_label_smoothing_is_that_of_the_trainer():
    hidden, weight, labels, _ = problem(23, 101, ignored=5)
    expected = LabelSmoother(epsilon=0.2)({"logits": F.linear(hidden, weight)}, labels)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, label_smoothing=0.2), expected)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("tokens", [0, 5])
def test_without_a_counted_row_as_torch(reduction, tokens, poisoned):
    hidden, weight, labels, _ = problem(tokens, 11, ignored=tokens)
    expected = F.cross_entropy(F.linear(hidden, weight), labels, reduction=reduction)
    loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    (grad,) = torch.autograd.grad(loss, hidden)
    assert torch.equal(grad, torch.zeros_like(hidden))


def test_another_ignore_index_inside_the_vocabulary():
    hidden, weight, labels, _ = problem(40, 5)
    expected = F.cross_entropy(F.linear(hidden, weight), labels, ignore_index=2)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, ignore_index=2), expected)


def test_leading_axes_int32_labels_and_strided_inputs():
    hidden, weight, labels, _ = problem(24, 30, dim=32)
    expected = F.cross_entropy(F.linear(hidden[::2, ::2], weight[:, ::2]), labels[::2])
    strided = hidden[::2, ::2].reshape(4, 3, 16).transpose(0, 1)
    weight = weight[:, ::2].t().contiguous().t()
    loss = linear_cross_entropy(strided, weight, labels[::2].int().reshape(4, 3).t())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden), torch.autograd.grad(expected, hidden))


def test_large_logits_do_not_overflow():
    hidden, weight, labels, _ = problem(6, 40)
    with torch.no_grad():
        hidden.mul_(1e4)
    assert_matches_naive(hidden, weight, labels, None)


def test_half_precision_gradient_survives_a_mean_over_many_rows():
    """With the 1 / rows inside, float16 loses what a loss scaler (here 2^16, as GradScaler starts) is there to keep."""
    hidden, weight, labels, _ = problem(4096, 64, dtype=torch.float16)
    with torch.no_grad():
        weight.mul_(1e-4)
    _, expected = naive(hidden.detach(), weight, labels)
    (grad,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels) * 2.0**16, hidden)
    error = (grad.double() / 2.0**16 - expected).norm() / expected.norm()
    assert error < 4 * EPS[torch.float16]


def test_head_in_another_dtype_and_autocast():
    hidden, weight, labels, bias = problem(12, 40, bias=True)
    expected = F.cross_entropy(F.linear(hidden.bfloat16(), weight.bfloat16(), bias.bfloat16()).float(), labels)
    narrow = linear_cross_entropy(hidden, weight.bfloat16(), labels, bias.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = linear_cross_entropy(hidden, weight, labels, bias)
    for loss in (narrow, cast):
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)
        (grad,) = torch.autograd.grad(loss, hidden)
        assert grad.dtype == torch.float32
        reference = torch.autograd.grad(expected, hidden, retain_graph=True)[0]
        assert (grad - reference).norm() < 2 * EPS[torch.bfloat16] * reference.norm()


def test_gradcheck_in_float64():
    hidden, weight, labels, bias = problem(6, 11, dim=5, ignored=1, bias=True)
    for options in OPTIONS.values():
        assert torch.autograd.gradcheck(
            lambda h, options=options: linear_cross_entropy(
                h, weight.double(), labels, bias.double(), chunk_size=4, **options
            ),
            hidden.detach().double().requires_grad_(),
        )


def test_differentiating_the_gradient_again_is_refused():
    hidden, weight, labels, _ = problem(4, 7)
    loss = linear_cross_entropy(hidden, weight, labels)
    scale = torch.ones((), requires_grad=True)
    (grad,) = torch.autograd.grad(loss * scale, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def saved_bytes(call):
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel() * t.element_size()) or t, lambda t: t
    ):
        result = call()
    return sum(sizes), result


def test_backward_keeps_one_tensor_like_hidden():
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, labels, _ = problem(50, 1000, dtype=dtype)
        size, _ = saved_bytes(lambda h=hidden, w=weight, y=labels: linear_cross_entropy(h, w, y))
        assert size == hidden.numel() * hidden.element_size() + 4


def test_backward_allocates_only_the_gradient(tmp_path):
    hidden, weight, labels, _ = problem(256, 32, dim=64)
    loss = linear_cross_entropy(hidden, weight, labels)
    sizes = allocations(loss.backward, tmp_path)
    assert 4 * hidden.numel() <= sum(sizes) < 4 * hidden.numel() + 1024


DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_CUDA])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_incoming_gradient_is_not_rounded_to_half_precision(dtype, device):
    grad, factor = torch.randn(100, 30, device=device).to(dtype), torch.tensor(1e-6 / 3, device=device) * 1e4
    expected = (grad.float() * factor).to(dtype)
    assert torch.equal(torch.ops.hf_qst.scale_gradient(grad, factor), expected)


@pytest.mark.parametrize("how", ["no_grad", "frozen"])
def test_without_a_gradient_nothing_is_kept(how, poisoned):
    hidden, weight, labels, _ = problem(9, 50)
    expected, _ = naive(hidden.detach(), weight, labels)
    hidden.requires_grad_(how == "no_grad")
    weight.requires_grad_(how == "no_grad")  # evaluating under no_grad is fine with a head that is being trained
    with torch.set_grad_enabled(how != "no_grad"):
        size, loss = saved_bytes(lambda: linear_cross_entropy(hidden, weight, labels))
    assert size == 0 and not loss.requires_grad
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["everything"]], ids=["plain", "everything"])
def test_logits_never_exist_at_once(options, tmp_path):
    tokens, vocab, chunk = 256, 2048, 16
    hidden, weight, labels, _ = problem(tokens, vocab, ignored=64)

    def ours():
        linear_cross_entropy(hidden, weight, labels, chunk_size=chunk, **options).backward()

    def plain():
        F.cross_entropy(F.linear(hidden, weight), labels).backward()

    assert max(allocations(plain, tmp_path)) >= 4 * tokens * vocab  # the measure sees the tensors it is there to see
    assert max(allocations(ours, tmp_path)) <= 4 * chunk * vocab


def test_default_chunk_is_bounded_in_bytes_and_below_in_rows():
    assert 4 * 8192 * default_chunk_rows(8192, "cpu") == 16 * 2**20
    assert default_chunk_rows(32000, "cuda") == 512 and 4 * 32000 * 512 <= 64 * 2**20
    assert default_chunk_rows(262144, "cpu") == 128 and default_chunk_rows(262144, "cuda") == 256


@pytest.mark.parametrize("ignored", [0, 3])
def test_opcheck(ignored):
    hidden, weight, labels, bias = problem(7, 11, ignored=ignored, bias=True)
    args = (hidden, weight, labels, bias, -100, 0.1, 2.0, 0.5, "mean", 3, True)
    torch.library.opcheck(torch.ops.hf_qst.linear_cross_entropy.default, args)
    args = (hidden.detach(), weight, labels, None, -100, 0.0, None, 1.0, "sum", None, False)
    torch.library.opcheck(torch.ops.hf_qst.linear_cross_entropy.default, args)
    torch.library.opcheck(torch.ops.hf_qst.scale_gradient.default, (hidden.detach().half(), torch.tensor(0.3)))


@pytest.mark.parametrize("dynamic", [None, True], ids=["", "dynamic"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_into_one_graph(backend, dynamic):
    hidden, weight, labels, bias = problem(7, 11, ignored=2, bias=True)

    def step(hidden):
        return linear_cross_entropy(torch.tanh(hidden), weight, labels, bias, label_smoothing=0.1) * 2

    expected = step(hidden)
    loss = torch.compile(step, fullgraph=True, backend=backend, dynamic=dynamic)(hidden)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden), torch.autograd.grad(expected, hidden))


def test_compiles_under_autocast():
    hidden, weight, labels, _ = problem(7, 11)

    def step(hidden):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return linear_cross_entropy(hidden, weight, labels)

    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(hidden)
    torch.testing.assert_close(loss, step(hidden))


def test_meta_tensors_give_meta_tensors():
    hidden, weight, labels = (tensor.to("meta") for tensor in problem(7, 11)[:3])
    loss = linear_cross_entropy(hidden, weight, labels)
    (grad,) = torch.autograd.grad(loss, hidden)
    assert loss.shape == () and loss.is_meta and grad.shape == hidden.shape


def test_exports_as_one_operator():
    class Loss(torch.nn.Module):
        def forward(self, hidden, weight, labels):
            return linear_cross_entropy(hidden, weight, labels)

    hidden, weight, labels, _ = problem(7, 11)
    args = (hidden.detach(), weight, labels)
    program = torch.export.export(Loss(), args)
    assert "hf_qst.linear_cross_entropy" in program.graph_module.code
    torch.testing.assert_close(program.module()(*args), linear_cross_entropy(*args))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.tensor([0, 5, 1])}, ValueError, r"labels must be in \[0, 5\).*got 1 others, the first 5"),
        ({"labels": torch.tensor([0, -1, 1])}, ValueError, r"labels must be .*the first -1"),
        ({"labels": torch.tensor([0.0, 1.0, 1.0])}, TypeError, "labels must be integers, got torch.float32"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, ValueError, r"labels must have hidden's shape.*got \[4\]"),
        ({"weight": torch.randn(5, 3)}, ValueError, r"weight must be \[vocab, dim\].*got \[5, 3\]"),
        ({"weight": torch.randn(5, 4, requires_grad=True)}, ValueError, "weight requires a gradient"),
        ({"bias": torch.randn(5, requires_grad=True)}, ValueError, "bias requires a gradient"),
        ({"bias": torch.randn(4)}, ValueError, r"bias must be \[vocab\] = \[5\], got \[4\]"),
        ({"weight": torch.ones(5, 4, dtype=torch.int64)}, TypeError, "weight must have a dtype of"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
        ({"logit_softcap": 0.0}, ValueError, "logit_softcap must be .*got 0.0"),
        ({"logit_scale": float("inf")}, ValueError, "logit_scale must be finite, got inf"),
        ({"reduction": "none"}, ValueError, "reduction must be 'mean' or 'sum', got 'none'"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be .*got 0"),
    ],
)
def test_refuses_with_the_argument_and_its_value(change, error, message):
    arguments = {"hidden": torch.randn(3, 4), "weight": torch.randn(5, 4), "labels": torch.tensor([0, 1, 2])}
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{**arguments, **change})


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [1, 3, 4097, 50257])
def test_on_cuda_as_on_cpu(backend, dtype, vocab):
    hidden, weight, labels, bias = problem(37, vocab, ignored=9, bias=True, dtype=dtype)
    device_args = [t.detach().cuda() for t in (hidden, weight, labels, bias)]
    device_args[0].requires_grad_()
    for options in OPTIONS.values():
        with use_backend(backend):
            loss = linear_cross_entropy(*device_args, chunk_size=16, **options)
            (grad,) = torch.autograd.grad(loss, device_args[0])
        expected_loss, expected_grad = naive(hidden.detach(), weight, labels, bias, **options)
        loss_bound, grad_bound = rounding_bounds(hidden, weight, labels, bias, **options)
        assert abs(loss.item() - expected_loss.item()) <= loss_bound
        assert ((grad.cpu().double() - expected_grad).abs() <= grad_bound).all()
