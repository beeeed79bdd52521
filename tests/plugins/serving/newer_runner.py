"""Runs the tests of a file in vLLM's V2 model runner on a CPU: `python -m tests.plugins.serving.newer_runner FILE ...`.

That runner's kernels are Triton's. vLLM asks for a Triton with a CPU backend; Triton's interpreter runs them too, once a
backend of that name is listed.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"

import pytest
from triton.backends import Backend, backends


class _Driver:
    @staticmethod
    def is_active() -> bool:
        return True


if __name__ == "__main__":
    backends["cpu"] = Backend(compiler=None, driver=_Driver)
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
