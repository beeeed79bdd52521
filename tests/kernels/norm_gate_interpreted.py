"""Runs what no example of the registry reaches in the kernels of the taps and of `norm_gate`, on the CPU; a test starts it.

Prints for each case how far it is from what it should be, and how far it may be. A process of its own, because
`TRITON_INTERPRET` is read when Triton is imported.
"""

import itertools
import json

import torch

from hf_qst_kernels import norm_gate, quantize_taps, tap_linear, use_backend
from hf_qst_kernels.decisions import NORM_GATE_WIDTH, TAP_OUTPUTS_UNALIGNED
from hf_qst_kernels.dispatch import use_configuration
from hf_qst_kernels.ops import norm_gate_triton, tap_linear_triton
from hf_qst_kernels.ops.norm_gate import naive_norm_gate
from hf_qst_kernels.ops.tap_linear import naive_tap_linear
from tests.kernels.compared import TOLERANCE, distance, poison, results, worst_distance

FLOAT32 = TOLERANCE[torch.float32]


def leaf(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype).requires_grad_()


def programs_with_several_tiles():
    """Sums of gate, weight and bias over tiles and programs; the last of both are partly empty."""
    for rows, width, programs in ((23, 16, 3), (9, 48, 2), (40, 64, 1)):
        arguments = {"down": leaf(rows, width), "side": leaf(rows, width), "gate": leaf(width)}
        arguments |= {"weight": leaf(width), "bias": leaf(width)}
        twin = results(naive_norm_gate, arguments, torch.float64)
        options = {"TILE": 128, "PROGRAMS": programs, "num_warps": 4}
        with use_configuration("norm_gate_backward", options):
            ours = results(norm_gate, arguments)
        yield f"{rows} rows of {width}, {programs} programs", worst_distance(ours, twin), FLOAT32


def mixed_dtypes():
    """As under autocast: what the tap returned is narrower than the side network's own state and its parameters."""
    for down, side, weight in itertools.product((torch.bfloat16, torch.float16, torch.float32), repeat=3):
        arguments = {"down": leaf(5, 48, dtype=down), "side": leaf(5, 48, dtype=side), "gate": leaf(1)}
        arguments |= {"weight": leaf(48, dtype=weight), "bias": leaf(48), "out_dtype": torch.float32}
        twin = results(naive_norm_gate, arguments, torch.float64)
        ours = results(norm_gate, arguments)
        assert [t.dtype for t in ours] == [torch.float32, down, side, torch.float32, weight, torch.float32]
        # each by its own dtype: what comes out in float32 was never rounded to less
        shares = [distance(a, b) / TOLERANCE[a.dtype] for a, b in zip(ours, twin, strict=True)]
        yield f"{down}, {side}, {weight}", max(shares), 1.0


def extremes():
    down, side = torch.randn(4, 48) + 1e4, torch.randn(4, 48)
    weight, bias = torch.ones(48), torch.zeros(48)
    for gamma, expected in ((-100.0, torch.nn.functional.layer_norm(down.double(), (48,))), (100.0, side.double())):
        y = norm_gate(down, side, torch.tensor([gamma]), weight, bias)
        # float32 resolves 1e4 to 1e-3, and the mean of such numbers likewise
        yield f"gate {gamma}", distance(y, expected), 2e-3 if gamma < 0 else 0.0
    constant = torch.full((2, 48), 3.0)
    y = norm_gate(constant, constant, torch.full((1,), -100.0), weight, bias)
    yield "constant rows", distance(y, constant * 0), 0.0
    broken = side.clone()
    broken[1, 7] = float("nan")
    y = norm_gate(broken, side, torch.zeros(1), weight, bias)
    fine = y[1].isnan().all() and y[[0, 2, 3]].isfinite().all()
    yield "a row that is not finite stays alone", float(not fine), 0.0


def calls_of(module, name, call):
    """How often a launcher ran during a call."""
    seen, real = [], getattr(module, name)
    setattr(module, name, lambda *args: (seen.append(1), real(*args))[1])
    try:
        call()
    finally:
        setattr(module, name, real)
    return len(seen)


def chosen_paths():
    def gate(width, dtype=torch.float32):
        return lambda: norm_gate(torch.randn(2, width, dtype=dtype), torch.randn(2, width, dtype=dtype), torch.zeros(1))

    counts = [calls_of(norm_gate_triton, "mix_rows", gate(n)) for n in (NORM_GATE_WIDTH, NORM_GATE_WIDTH + 1)]
    counts.append(calls_of(norm_gate_triton, "mix_rows", gate(8, torch.float64)))
    yield "wide rows and float64 take torch", float(counts != [1, 0, 0]), 0.0

    def tap(dim, outputs, **options):
        return lambda: tap_linear(torch.randn(3, dim), torch.randn(outputs, dim).bfloat16(), **options)

    cases = (tap(32, 256), tap(32, 257), tap(33, TAP_OUTPUTS_UNALIGNED), tap(33, TAP_OUTPUTS_UNALIGNED + 1))
    counts = [calls_of(tap_linear_triton, "project_and_quantize", case) for case in cases]
    yield "taps by outputs and alignment", float(counts != [1, 0, 1, 0]), 0.0


def taps_in_one_pass():
    """The int8 copy is of x itself, whether it is centred or not, and is the quantiser's bit by bit."""
    x, center = torch.randn(7, 130) + 5, torch.randn(130) + 5
    expected = quantize_taps(x)
    for c in (None, center):
        kept = tap_linear(x, leaf(3, 130), center=c).grad_fn.saved_tensors[:2]
        yield f"the copy, {'no ' if c is None else ''}center", float(not all(map(torch.equal, kept, expected))), 0.0
    for dtype in (torch.bfloat16, torch.float16):
        wide = (x + 300).to(dtype)
        arguments = {"x": wide, "weight": torch.randn(3, 130).to(dtype), "center": wide.float().mean(0)}
        twin = results(naive_tap_linear, arguments, torch.float64)
        # the difference alone is rounded, neither the center nor the product
        yield f"a large center in {dtype}", worst_distance(results(tap_linear, arguments), twin), TOLERANCE[dtype]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = tap_linear(x, torch.randn(3, 130), center=center)
    yield "autocast decides the product's dtype", float(y.dtype != torch.bfloat16), 0.0


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    poison(setattr)
    cases = (programs_with_several_tiles, mixed_dtypes, extremes, chosen_paths, taps_in_one_pass)
    with use_backend("triton"):
        print(json.dumps({f"{case.__name__} | {name}": limits for case in cases for name, *limits in case()}))
