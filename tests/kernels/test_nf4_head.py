"""`linear_cross_entropy` with a head in 4 bits: in slices of the vocabulary it gives what the whole head gives."""

import pytest
import torch
import torch.nn.functional as F

from hf_qst_kernels import NF4Weight, linear_cross_entropy, use_backend
from hf_qst_kernels.nf4_weight import check_weight, library_weight, naive_weight
from hf_qst_kernels.ops import linear_cross_entropy as cross_entropy
from hf_qst_kernels.ops.linear_cross_entropy import default_chunk_rows, naive_linear_cross_entropy
from tests.kernels.compared import TOLERANCE, allocations, fresh, peak, results, worst_distance

bnb = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
HEAD = NF4Weight(torch.zeros(160, dtype=torch.uint8), torch.ones(5), 5)
OPTIONS = {
    "plain": {},
    "sum and scale": {"reduction": "sum", "logit_scale": 0.37},
    "everything": {"label_smoothing": 0.3, "logit_softcap": 3.0, "logit_scale": 0.5},
}
EACH = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
DOUBLE = pytest.mark.parametrize("double", [False, True], ids=["single", "double"])


def quantised(weight, double):
    """As bitsandbytes stores it: what ours takes, and what bitsandbytes reads from it."""
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=double)
    nested = (state.state2.absmax, state.state2.code, state.offset) if double else ()
    return NF4Weight(packed, state.absmax, weight.shape[0], *nested), bnb.dequantize_4bit(packed, state)


@DOUBLE
@pytest.mark.parametrize("shape", [(1, 64), (48, 1088)], ids=str)
def test_weights_are_read_as_bitsandbytes_writes_them(shape, double):
    """Bit by bit. The scales of one row of 64 end in the first block of the second quantisation, those of 48 x 1088 in a
    later one."""
    weight, whole = quantised(torch.randn(shape), double)
    check_weight(weight, shape[1])
    for dequantise in (naive_weight, library_weight):
        assert torch.equal(dequantise(weight, torch.float32), whole)


def problem(tokens=23, vocab=257, dim=192, ignored=5, double=True, dtype=torch.float32):
    """The arguments, and the head whole."""
    weight, whole = quantised(torch.randn(vocab, dim) / dim**0.5, double)
    labels = torch.randint(vocab, (tokens,))
    labels[torch.randperm(tokens)[:ignored]] = -100
    hidden, bias = torch.randn(tokens, dim).to(dtype).requires_grad_(), torch.randn(vocab).to(dtype)
    return {"hidden": hidden, "weight": weight, "labels": labels, "bias": bias}, whole


def slice_rows(monkeypatch, words, dim, itemsize=4):
    monkeypatch.setattr(cross_entropy, "SLICE_BYTES", dict.fromkeys(("cpu", "cuda"), words * dim * itemsize))


@DOUBLE
@EACH
@pytest.mark.parametrize("words", [64, 128, 1024], ids=["5 slices", "3 slices", "1 slice"])
def test_equals_torch_on_what_bitsandbytes_dequantises(options, double, words, monkeypatch, poisoned):
    arguments, whole = problem(double=double)
    slice_rows(monkeypatch, words, whole.shape[1])
    options = dict(options)
    loss = linear_cross_entropy(**arguments, **options, chunk_size=7)
    cap, scale = options.pop("logit_softcap", None), options.pop("logit_scale", 1.0)
    logits = scale * F.linear(arguments["hidden"], whole, arguments["bias"])
    expected = F.cross_entropy(
        logits if cap is None else cap * torch.tanh(logits / cap), arguments["labels"], **options
    )
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, arguments["hidden"])[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients)


@DOUBLE
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("vocab", [1, 63, 1023])
def test_slices_equal_the_naive_twin(dtype, vocab, double, monkeypatch, poisoned):
    arguments, _ = problem(tokens=9, vocab=vocab, ignored=2, double=double, dtype=dtype)
    slice_rows(monkeypatch, 64, 192, dtype.itemsize)
    twin = results(naive_linear_cross_entropy, arguments, torch.float64)
    assert worst_distance(results(linear_cross_entropy, {**arguments, "chunk_size": 4}), twin) <= TOLERANCE[dtype]


def test_slices_are_views_of_all_words_once(monkeypatch):
    seen, dequantise = [], cross_entropy.library_weight

    def count(weight, dtype):
        seen.append(weight.out_features)
        return dequantise(weight, dtype)

    arguments, _ = problem(tokens=8, vocab=300, ignored=0)
    monkeypatch.setattr(cross_entropy, "library_weight", count)
    slice_rows(monkeypatch, 150, 192)  # whole blocks of 64 words: 128
    linear_cross_entropy(**arguments, chunk_size=4)
    assert seen == [128, 128, 44] * 2 * 2  # for the logits and for the gradient of each of two chunks
    seen.clear()
    with torch.no_grad():
        linear_cross_entropy(**arguments, chunk_size=8)
    assert seen == [128, 128, 44]


def test_many_slices_round_a_half_precision_gradient_hardly_more_than_one(monkeypatch):
    """Each slice's share is rounded once and their sum is float32; summed in bfloat16 the error would be several times that."""
    arguments, _ = problem(tokens=64, vocab=64 * 64, dim=64, ignored=0, dtype=torch.bfloat16)
    exact = results(naive_linear_cross_entropy, arguments, torch.float64)[1]
    errors = []
    for words in (64, 64 * 64):
        slice_rows(monkeypatch, words, 64, 2)
        errors.append((results(linear_cross_entropy, arguments)[1].double() - exact).norm() / exact.norm())
    assert errors[0] < 1.2 * errors[1] < 2 * 2**-7


def test_gradcheck_over_slices(monkeypatch):
    arguments, _ = problem(tokens=3, vocab=130, dim=64, ignored=1)
    slice_rows(monkeypatch, 64, 64, 8)
    copies = fresh(arguments, torch.float64)
    hidden = copies.pop("hidden")
    assert torch.autograd.gradcheck(lambda h: linear_cross_entropy(h, **copies, chunk_size=2), hidden, fast_mode=True)


@DOUBLE
def test_neither_logits_nor_the_head_exist_at_once(double, monkeypatch, tmp_path):
    tokens, vocab, dim, chunk, words = 128, 4096, 128, 16, 256
    arguments, whole = problem(tokens, vocab, dim, ignored=16, double=double)
    slice_rows(monkeypatch, words, dim)

    def ours():
        linear_cross_entropy(**arguments, chunk_size=chunk).backward()

    def plain():
        weight = bnb.dequantize_4bit(*packed)
        F.cross_entropy(F.linear(arguments["hidden"], weight), arguments["labels"]).backward()

    packed = bnb.quantize_4bit(whole, quant_type="nf4", blocksize=64)
    largest = max(allocations(plain, tmp_path))
    assert largest >= 4 * vocab * dim and largest >= 4 * tokens * vocab  # the measure sees what it is there to see
    sizes = allocations(ours, tmp_path)
    logits, part = 4 * chunk * vocab, 4 * words * dim
    assert max(sizes) <= max(logits, part) and sizes.count(part) == 2 * 16 * 7  # 112 of 128 rows count
    arguments["hidden"].grad = None
    rest = 4 * vocab * dim // 64 + 4 * tokens * dim  # scales, and the gradient in hidden
    assert peak(ours, tmp_path) < logits + part + rest + part // 2  # so there is no second slice


def test_dtype_of_the_products_is_that_of_hidden_or_autocasts():
    arguments, whole = problem(dtype=torch.float32)
    hidden, bias = arguments["hidden"], arguments["bias"]
    expected = F.cross_entropy(
        F.linear(hidden.bfloat16(), whole.bfloat16(), bias.bfloat16()).float(), arguments["labels"]
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(**arguments)
    assert loss.dtype == torch.float32
    assert abs(loss - expected) < 1e-4 < abs(linear_cross_entropy(**arguments) - expected)
    (grad,) = torch.autograd.grad(loss, hidden)
    (reference,) = torch.autograd.grad(expected, hidden)
    assert grad.dtype == torch.float32
    assert (grad - reference).norm() < 2 * 2**-7 * reference.norm()


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "NF4"])
def test_naive_twin_stays_in_float32_under_autocast(packed):
    arguments, whole = problem()
    arguments |= {"weight": arguments["weight"] if packed else whole, "bias": arguments["bias"].bfloat16()}
    exact = linear_cross_entropy(**arguments)
    with torch.autocast("cpu", torch.bfloat16), use_backend("naive"):
        loss = linear_cross_entropy(**arguments)
    assert loss.dtype == torch.float32 and abs(loss - exact) < 2e-3


def test_a_chunk_has_rows_enough_to_pay_for_dequantising():
    assert default_chunk_rows(128256, "cpu", nf4=True) == 256
    assert default_chunk_rows(128256, "cuda", nf4=True) == 1024
    assert default_chunk_rows(1000, "cuda", nf4=True) == default_chunk_rows(1000, "cuda") > 1024


def test_keeps_one_tensor_like_hidden_for_backward():
    arguments, sizes = problem()[0], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        linear_cross_entropy(**arguments)
    assert sorted(sizes) == [1, arguments["hidden"].numel()]


def test_traces_without_data():
    arguments, _ = problem()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(results(compiled, arguments), results(linear_cross_entropy, arguments))
    meta = {name: tensor.to("meta") for name, tensor in arguments.items() if name != "weight"}
    meta["weight"] = NF4Weight(*(t.to("meta") if isinstance(t, torch.Tensor) else t for t in arguments["weight"]))
    loss = linear_cross_entropy(**meta)
    assert loss.is_meta and loss.shape == () and loss.dtype == torch.float32
    assert torch.autograd.grad(loss, meta["hidden"])[0].shape == arguments["hidden"].shape


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.ones(3, 100)}, ValueError, r"hidden must be .* a multiple of 64, got \[3, 100\]"),
        ({"hidden": torch.ones(3, 128)}, ValueError, r"packed must hold .* = 320 bytes for out_features 5, got 160"),
        ({"bias": torch.ones(4)}, ValueError, r"bias must be \[vocab\] = \[5\], got \[4\]"),
        ({"bias": torch.ones(5, requires_grad=True)}, ValueError, "bias requires a gradient"),
        ({"labels": torch.tensor([0, 5, 1])}, ValueError, r"labels must be in \[0, 5\).*the first 5"),
        ({"weight": [1.0]}, TypeError, "weight must be a tensor or an NF4Weight, got list"),
        ({"weight": HEAD._replace(packed=torch.zeros(160))}, TypeError, "packed must be uint8"),
        ({"weight": HEAD._replace(absmax=torch.ones(3))}, ValueError, r"absmax must be .* = \[5\], got \[3\]"),
        (
            {"weight": HEAD._replace(absmax=torch.ones(5).byte())},
            TypeError,
            "absmax must be torch.float32 without nested",
        ),
        ({"weight": HEAD._replace(nested_code=torch.ones(256))}, ValueError, "must be given together or not at all"),
    ],
)
def test_refuses_with_the_argument_and_its_value(change, error, message):
    arguments = {"hidden": torch.randn(3, 64), "weight": HEAD, "labels": torch.tensor([0, 1, 2])}
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{**arguments, **change})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@DOUBLE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_slices_on_cuda(dtype, double, monkeypatch, poisoned):
    arguments, _ = problem(tokens=9, vocab=1023, ignored=2, double=double, dtype=dtype)
    slice_rows(monkeypatch, 64, 192, dtype.itemsize)
    twin = results(naive_linear_cross_entropy, arguments, torch.float64)
    there = {name: tensor.detach().cuda() for name, tensor in arguments.items() if name != "weight"}
    there["hidden"].requires_grad_()
    there["weight"] = NF4Weight(*(t.cuda() if isinstance(t, torch.Tensor) else t for t in arguments["weight"]))
    ours = [tensor.cpu() for tensor in results(linear_cross_entropy, {**there, "chunk_size": 4})]
    assert worst_distance(ours, twin) <= TOLERANCE[dtype]
