"""The Triton kernels where there is no GPU: run by Triton's interpreter, and compiled for GPUs that are not here."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.kernels.compiled import NVIDIA, fits, sources
from benchmarks.kernels.registry import OPS
from tests.interpreter import interpreted
from tests.kernels.compared import TOLERANCE

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "kernels_compiled.json"


@pytest.fixture(scope="module")
def distances():
    return interpreted("tests/kernels/triton_interpreted.py")


@pytest.fixture(scope="module")
def registry_distances():
    return interpreted("tests/kernels/registry_interpreted.py")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_kernels_equal_the_naive_twin_in_float64(registry_distances, op, dtype):
    """Values and gradients; odd, strided and empty inputs; results allocated full of NaN."""
    errors = {name: e for name, e in registry_distances.items() if name.startswith(f"{op.name} | {dtype} | ")}
    assert len(errors) == len(list(op.examples(torch.float32, "cpu")))
    tolerance = TOLERANCE[getattr(torch, dtype)]
    assert {name: error for name, error in errors.items() if not error <= tolerance} == {}


def test_every_configuration_gives_the_same(registry_distances):
    errors = {name: error for name, error in registry_distances.items() if name.startswith("configuration ")}
    assert len(errors) == 3 * 4 + (4 + 4) + (4 + 4) + 6 * 2
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE[torch.float32]} == {}


@pytest.mark.parametrize("name", ["an index out of range is no number", "and writes nothing", "repeated runs"])
def test_properties_of_the_kernels(registry_distances, name):
    assert registry_distances[name] == 0


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


def compiled(tmp_path_factory, *arguments):
    command = [sys.executable, "-m", "benchmarks.kernels.compiled", "--output", "-", *arguments]
    environment = {
        **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),  # a cached kernel would prove nothing
        "TRITON_DEFAULT_FP_FUSION": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("target", "ops"), [("gfx942", ["linear_cross_entropy"]), ("sm_90", ["quantize_taps", "linear_index_add"])]
)
def test_kernels_compile_without_spills_within_shared_memory(tmp_path_factory, target, ops):
    rows = compiled(tmp_path_factory, "--each-once", "--targets", target, "--ops", *ops)
    assert rows and [row for row in rows if not fits(row)] == []


def test_record_is_of_these_kernels_and_all_fit():
    """`python -m benchmarks.kernels --compile` writes it; compiling everything takes minutes."""
    record = json.loads(RECORD.read_text())
    assert record["sources"] == sources()
    assert {row["target"] for row in record["rows"]} == set(NVIDIA)
    assert [row for row in record["rows"] if not fits(row)] == []


def test_interpreter_stays_in_its_process():
    assert os.environ.get("TRITON_INTERPRET") != "1"
