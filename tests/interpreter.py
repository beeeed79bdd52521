"""Starts a script of the tests in a process of its own, where Triton's kernels run in its interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def interpreted(script: str, *arguments: str) -> dict:
    """What a script prints last, which is JSON; `script` is a path from the repository's root."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *(path for path in sys.path if path)]),
        "TRITON_INTERPRET": "1",
    }
    command = [sys.executable, "-W", "ignore", ROOT / script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
