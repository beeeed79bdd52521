"""The Triton kernels where there is no GPU: run by Triton's interpreter, and compiled for GPUs that are not here."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

# bytes of shared memory a block may have
SHARED_LIMITS = {"sm_80": 166912, "sm_90": 232448, "gfx942": 65536}


def run(script, tmp_path_factory, **variables):
    environment = {
        **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),  # a cached kernel would prove nothing
        **variables,
    }
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name(script)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def distances(tmp_path_factory):
    return run("triton_interpreted.py", tmp_path_factory, TRITON_INTERPRET="1")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("options", ["plain", "smoothing", "softcap", "both"])
def test_cross_entropy_kernel_equals_its_torch_twin(distances, options, dtype):
    errors = {
        name: error
        for name, error in distances.items()
        if name.startswith(f"cross_entropy {options} ") and name.endswith(f" {dtype}")
    }
    assert len(errors) == 5
    # float32: sums of up to 9000 terms in another order. Half precision: the twins' `p - target` may round to either
    # neighbour, a step of eps; for bfloat16 the interpreter's store may add one.
    tolerance = {"float32": 1e-5, "float16": 2**-10, "bfloat16": 2 * 2**-7}[dtype]
    assert {name: error for name, error in errors.items() if not error <= tolerance} == {}


def test_kernel_handles_rows_that_are_usually_dropped(distances):
    names = ["ignored row", "label out of range", "rows beside them", "gradients beside them"]
    names += ["masked words", "logits untouched without a gradient"]
    assert {name: distances[name] for name in names if not distances[name] <= 1e-6} == {}


def test_quantise_kernel_equals_its_torch_twin_bit_by_bit(distances):
    errors = {name: error for name, error in distances.items() if name.startswith("quantize ")}
    assert len(errors) == 36
    assert {name: error for name, error in errors.items() if error != 0} == {}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dequantise_kernel_equals_its_torch_twin(distances, dtype):
    errors = {
        name: error
        for name, error in distances.items()
        if name.startswith("dequantize") and name.endswith(f" to {dtype}")
    }
    assert len(errors) == 36
    tolerance = 2**-7 if dtype == "bfloat16" else 0  # the interpreter's bfloat16 store
    assert {name: error for name, error in errors.items() if not error <= tolerance} == {}


def test_tap_linear_gradient_through_the_kernels(distances):
    errors = {name: error for name, error in distances.items() if name.startswith("tap_linear")}
    assert len(errors) == 36 and max(errors.values()) <= 1e-6


def test_special_values_in_the_quantise_kernel(distances):
    names = ["zeros and tiny blocks", "not finite stays so", "others stay finite", "huge", "finite blocks as torch"]
    names.append("ties to even")
    assert {name: distances[name] for name in names if not distances[name] <= 1e-6} == {}


def test_kernels_compile_within_shared_memory(tmp_path_factory):
    shared = run("triton_compiled.py", tmp_path_factory, TRITON_DEFAULT_FP_FUSION="1")
    assert {name.rsplit(" ", 1)[1] for name in shared} == set(SHARED_LIMITS)
    for name, size in shared.items():
        assert size <= SHARED_LIMITS[name.rsplit(" ", 1)[1]], name


def test_interpreter_stays_in_its_process():
    assert os.environ.get("TRITON_INTERPRET") != "1"
