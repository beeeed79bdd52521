"""Tests inside vLLM, which `make test-vllm` runs in an environment of its own. Elsewhere they are not collected."""

import os
from importlib.util import find_spec

# Read when vLLM is imported: the engine in this process, errors alone in its log, and no statistics sent.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

collect_ignore_glob = [] if find_spec("vllm") else ["*"]
