"""Which implementation runs where, and what importing the package does not do."""

import logging
import os
import subprocess
import sys

import pytest
import torch

from hf_qst_kernels import dispatch, quantize_taps, use_backend


@pytest.fixture
def forget_cached_answers():
    dispatch._triton_importable.cache_clear()
    dispatch._say_fallback_once.cache_clear()
    yield
    dispatch._triton_importable.cache_clear()
    dispatch._say_fallback_once.cache_clear()


class CudaTensor:
    """What the rule reads of a tensor."""

    is_cuda = True
    device = torch.device("cuda")
    dtype = torch.bfloat16


class CudaDoubleTensor(CudaTensor):
    dtype = torch.float64


def test_import_leaves_triton_and_cuda_alone():
    code = (
        "import os, sys; before = dict(os.environ); import torch; loaded = 'triton' in sys.modules\n"
        "import hf_qst_kernels; assert os.environ == before\n"
        "assert ('triton' in sys.modules) == loaded and not torch.cuda.is_initialized()\n"
        "assert not any(name.split('.')[0] in ('transformers', 'peft', 'hf_qst') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


def environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def test_cpu_and_float64_take_torch(forget_cached_answers):
    assert not dispatch.runs_triton("op", torch.ones(1))
    assert not dispatch.runs_triton("op", CudaDoubleTensor())


def test_cuda_takes_triton_where_it_imports(forget_cached_answers, monkeypatch):
    monkeypatch.setattr(dispatch.importlib, "import_module", lambda name: name)
    assert dispatch.runs_triton("op", CudaTensor())
    with use_backend("torch"):
        assert not dispatch.runs_triton("op", CudaTensor())
    assert dispatch.runs_triton("op", CudaTensor())


def test_falling_back_says_so_once(forget_cached_answers, monkeypatch, caplog):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(dispatch.importlib, "import_module", missing)
    with caplog.at_level(logging.WARNING, logger="hf_qst_kernels.dispatch"):
        assert not dispatch.runs_triton("op", CudaTensor())
        assert not dispatch.runs_triton("another op", CudaTensor())
    assert len(caplog.records) == 1 and "triton cannot be imported" in caplog.text
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"op: use_backend.*needs the package triton"):
        dispatch.runs_triton("op", CudaTensor())


def test_triton_on_the_cpu_is_refused_without_the_interpreter(forget_cached_answers, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "_triton_importable", lambda: True)
    with (
        use_backend("triton"),
        pytest.raises(RuntimeError, match=r"quantize_taps: .*needs CUDA tensors, got device cpu"),
    ):
        quantize_taps(torch.ones(2, 3))


def test_override_ends_with_its_block_and_refuses_unknown_names():
    with pytest.raises(RuntimeError, match="inside"), use_backend("torch"):
        raise RuntimeError("inside")
    assert dispatch._forced == "auto"
    with pytest.raises(ValueError, match=r"backend must be one of .*got 'cuda'"), use_backend("cuda"):
        pass
